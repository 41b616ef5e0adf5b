"""The reward stage's model as reward.

Axis letters: B completions, L = P + T positions of prompt and completion.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from perl.backbones.padding import left_pad
from perl.data.records import Prompt
from perl.rl.batches import micro_batches, trim
from perl.rl.rewards.base import RewardSource
from perl.rl.samplers.base import Samples
from perl.roles.roles import Role, Roles
from perl.roles.saved import Stamp


class RewardModel(RewardSource):
    """The reward adapter's reward, centred and scaled to unit spread on its training rows.

    Of a model of thumbs the reward is the probability of a thumb up, not its log-odds: unbounded log-odds pay the
    policy for making sure answers surer still (docs/experiments.md).

    Args:
        stamp: of the reward adapter; it holds mean and spread.
        micro_batch_size: rows scored at once.
        ends: what ends answers; the first is the one that its training rows end with.
    """

    name = "model"

    def __init__(self, roles: Roles, stamp: Stamp, micro_batch_size: int, ends: tuple[int, ...]) -> None:
        self._roles, self._stamp, self._micro_batch_size, self._ends = roles, stamp, micro_batch_size, ends

    def __call__(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        """As `rewards`: no code of the user's, whose failures have to be told from ours."""
        return self.rewards(prompts, samples, texts)

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        scores = self.scores(samples)
        rewards = probabilities(scores) if self._stamp.reward_is_probability else scores
        return [(reward - self._stamp.reward_mean) / self._stamp.reward_std for reward in rewards]

    @torch.no_grad()
    def scores(self, samples: Samples) -> list[float]:
        """Scores of prompt and answer together, read at the answer's last token.

        An answer that ended with another end token than the training rows is read as if it ended with theirs: of
        others the reward model knows nothing.
        """
        scores = [0.0] * len(samples.ids_BL)
        samples = with_written_end(samples, self._ends)
        for rows in micro_batches(samples, self._micro_batch_size):
            batch = trim(samples, rows)
            outputs = self._roles(
                Role.REWARD,
                batch.ids_BL,
                batch.mask_BL,
                head=Role.REWARD,
                lower_hidden_BLD=batch.lower_hidden_BLD,
                prompts=batch.shared_prompts,
            )
            for row, score in zip(rows, outputs.scores_B.tolist(), strict=True):
                scores[row] = score
        return scores


class OtherRunsModel(RewardSource):
    """A reward model on a base of its own, which has the policy's tokenizer."""

    name = "run"

    def __init__(self, model: RewardModel) -> None:
        self._model = model

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        """Those of that model; hidden states of the policy's lower layers mean nothing to it."""
        return self._model.rewards(prompts, replace(samples, lower_hidden_BLD=None), texts)


def with_written_end(samples: Samples, ends: tuple[int, ...]) -> Samples:
    """Samples whose answers, where they ended, end with the first of the end tokens."""
    if not ends[1:]:
        return samples
    others = torch.tensor(ends[1:], dtype=torch.int64, device=samples.ids_BL.device)
    lengths_B1 = torch.tensor(samples.completion_lengths, device=samples.ids_BL.device)[:, None]
    last_B1 = samples.ids_BL.shape[1] - samples.completion_length + lengths_B1 - 1
    ids_B1 = samples.ids_BL.gather(1, last_B1)
    changed_B1 = torch.isin(ids_B1, others)
    if not bool(changed_B1.any()):
        return samples
    ids_BL = samples.ids_BL.scatter(1, last_B1, ids_B1.masked_fill(changed_B1, ends[0]))
    # What the lower layers made is of the tokens that were drawn.
    return replace(samples, ids_BL=ids_BL, lower_hidden_BLD=None)


def probabilities(scores: Sequence[float]) -> list[float]:
    """Log-odds as probabilities."""
    chances: list[float] = torch.tensor(scores, dtype=torch.float64).sigmoid().tolist()
    return chances


@torch.no_grad()
def score_rows(roles: Roles, rows: Sequence[list[int]], pad_id: int, micro_batch_size: int) -> list[float]:
    """The reward adapter's score of each row of tokens, as trained; rows of like length are read together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), micro_batch_size):
        chosen = order[start : start + micro_batch_size]
        ids_BL, mask_BL = left_pad([rows[index] for index in chosen], pad_id, roles.device)
        outputs = roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD)
        for index, score in zip(chosen, outputs.scores_B.tolist(), strict=True):
            scores[index] = score
    return scores
