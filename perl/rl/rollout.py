"""A rollout: answers drawn by the policy, with everything that is known of them before it learns.

Axis letters: B answers, L = P + T positions of prompt and answer, T answer positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl.data.records import Prompt
from perl.model.chat import ChatFormat
from perl.model.roles import Role, Roles
from perl.rl.algorithms import Scored
from perl.rl.rewards import RewardSource
from perl.rl.sampler import BUCKET, Samples, Sampling, sample


@dataclass(frozen=True)
class Answers:
    """Answers to prompts, and their scores."""

    prompts: list[Prompt]
    texts: list[str]
    samples: Samples
    scores_B: Tensor
    """What the policy is to raise: the reward, less the penalty for answers without an end."""
    rewards_B: Tensor
    """The reward alone."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts with their tokens."""

    prompts: list[Prompt]
    ids: list[list[int]]

    def take(self, chosen: Sequence[int]) -> "EncodedPrompts":
        """The prompts at these places."""
        return EncodedPrompts([self.prompts[i] for i in chosen], [self.ids[i] for i in chosen])

    def __len__(self) -> int:
        return len(self.prompts)


def answer(
    roles: Roles,
    role: Role,
    chat: ChatFormat,
    prompts: EncodedPrompts,
    sampling: Sampling,
    generator: torch.Generator,
    head: Role | None = None,
) -> tuple[Samples, list[str]]:
    """One answer for each prompt, as tokens and as text."""
    samples = sample(roles, role, prompts.ids, sampling, generator, head)
    return samples, [chat.decode(ids) for ids in samples.answers()]


def score(
    reward: RewardSource, prompts: EncodedPrompts, samples: Samples, texts: list[str], missing_end_penalty: float
) -> Answers:
    """The reward of each answer, and the penalty for those that were cut before their end."""
    rewards = reward(prompts.prompts, prompts.ids, samples.answers(), texts)
    rewards_B = torch.tensor(rewards, dtype=torch.float32, device=samples.ids_BL.device)
    scores_B = rewards_B - missing_end_penalty * (~samples.ended_B)
    return Answers(prompts.prompts, texts, samples, scores_B, rewards_B)


@torch.no_grad()
def read_answers(
    roles: Roles,
    role: Role,
    samples: Samples,
    micro_batch_size: int,
    *,
    temperature: float | None,
    head: Role | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Teacher-forced log-probs and values (B, T) of the answers, as one role, without gradients."""
    log_probs_BT = torch.zeros_like(samples.log_probs_BT) if temperature is not None else None
    values_BT = torch.zeros_like(samples.log_probs_BT) if head is not None else None
    for rows in micro_batches(samples, micro_batch_size):
        ids_bl, mask_bl, length = trim(samples, rows)
        outputs = roles(role, ids_bl, mask_bl, answer_length=length, temperature=temperature, head=head)
        if log_probs_BT is not None:
            log_probs_BT[rows, :length] = outputs.log_probs_BT
        if values_BT is not None:
            values_BT[rows, :length] = outputs.values_BT.masked_fill(~mask_bl[:, -length:], 0.0)
    return log_probs_BT, values_BT


def scored(answers: Answers, reference_log_probs_BT: Tensor, values_BT: Tensor | None) -> Scored:
    """What the algorithms read of a rollout."""
    samples = answers.samples
    return Scored(
        answers.scores_B, samples.log_probs_BT, reference_log_probs_BT, values_BT, samples.answer_mask_BT
    )


def micro_batches(samples: Samples, size: int) -> Iterator[list[int]]:
    """Row numbers, rows of like length together; of abridged samples two batches, as many as decide the peak."""
    lengths = [sum(both) for both in zip(samples.prompt_lengths, samples.answer_lengths, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    order = order[-2 * size :] if samples.abridged else order
    for start in range(0, len(order), size):
        yield order[start : start + size]


def trim(samples: Samples, rows: list[int]) -> tuple[Tensor, Tensor, int]:
    """These rows' ids and mask without the columns that are padding in all of them, and their answer length.

    Lengths are rounded up to a multiple of `BUCKET`.
    """
    total = samples.answer_length
    prompt = samples.ids_BL.shape[1] - total
    longest_prompt = max(samples.prompt_lengths[row] for row in rows)
    longest_answer = max(samples.answer_lengths[row] for row in rows)
    start = prompt - min(prompt, -(-longest_prompt // BUCKET) * BUCKET)
    length = min(total, -(-longest_answer // BUCKET) * BUCKET)
    window = slice(start, prompt + length)
    return samples.ids_BL[rows, window], samples.mask_BL[rows, window], length
