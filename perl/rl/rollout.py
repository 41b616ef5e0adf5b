"""A rollout: answers drawn by the policy, with everything that is known of them before it learns.

Axis letters: B answers, L = P + T positions of prompt and answer, T answer positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl.backbones.chat import ChatFormat
from perl.data.records import Prompt
from perl.rl.algorithms import Scored
from perl.rl.batches import micro_batches, trim
from perl.rl.rewards.combination import CombinedReward
from perl.rl.samplers.local import Samples, Sampling, Share, sample
from perl.roles.roles import Role, Roles


@dataclass(frozen=True)
class Answers:
    """Answers to prompts, and their scores."""

    prompts: list[Prompt]
    texts: list[str]
    samples: Samples
    rewards_B: Tensor
    """Weighted sums, raw, fp64: normalised later, when those of all processes are together."""
    reward_parts: dict[str, Tensor]
    """What they are sums of, by name."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts with their tokens."""

    prompts: list[Prompt]
    ids: list[list[int]]
    cut: int = 0
    """How many were too long."""

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
    share: Share | None = None,
) -> tuple[Samples, list[str]]:
    """One answer for each prompt, as tokens and as text."""
    samples = sample(roles, role, prompts.ids, sampling, generator, head, share)
    return samples, [chat.decode(ids) for ids in samples.completions()]


def score(reward: CombinedReward, prompts: EncodedPrompts, samples: Samples, texts: list[str]) -> Answers:
    """The reward of each answer."""
    scores = reward(prompts.prompts, samples, texts)
    return Answers(prompts.prompts, texts, samples, scores.total_B, scores.parts)


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
        batch = trim(samples, rows)
        outputs = roles(
            role,
            batch.ids_BL,
            batch.mask_BL,
            completion_length=batch.completion_length,
            temperature=temperature,
            head=head,
            lower_hidden_BLD=batch.lower_hidden_BLD,
        )
        if log_probs_BT is not None:
            log_probs_BT[rows, : batch.completion_length] = outputs.log_probs_BT
        if values_BT is not None:
            values_BT[rows, : batch.completion_length] = outputs.values_BT.masked_fill(
                ~batch.completion_mask_BT, 0.0
            )
    return log_probs_BT, values_BT


def scored(answers: Answers, reference_log_probs_BT: Tensor, values_BT: Tensor | None) -> Scored:
    """What the algorithms read of a rollout, its rewards raw."""
    samples = answers.samples
    return Scored(
        answers.rewards_B, samples.log_probs_BT, reference_log_probs_BT, values_BT, samples.completion_mask_BT
    )
