"""The reward stage's model as reward: a single model or an ensemble.

Axis letters: M members, B completions, N rows, L = P + T positions of prompt and completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perl.backbones.padding import at_the_end, left_pad
from perl.backbones.shared_prompts import SharedPrompts
from perl.backbones.tokens import Tokens
from perl.data.records import Prompt
from perl.measure.ensemble import Combine
from perl.rl.batches import micro_batches, trim
from perl.rl.rewards.base import RewardSource
from perl.rl.samplers.base import Samples
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.saved import Stamp


class RewardModel(RewardSource):
    """The reward of the reward stage's model, centred and scaled to unit variance on its training rows.

    If the model was trained on thumbs, the reward is the probability of a thumb up and not its log-odds: unbounded
    log-odds reward the policy for making certain completions even more certain (docs/experiments.md). The members
    of an ensemble are centred and scaled individually and then combined.

    Args:
        stamps: the members' stamps, which hold mean and standard deviation.
        micro_batch_size: rows scored at once.
        ends: the end tokens of completions; the training rows end with the first.
        combine, std_weight: see `combined`.
    """

    name, runs_user_code = "model", False

    def __init__(
        self,
        roles: Roles,
        stamps: Mapping[Role, Stamp],
        micro_batch_size: int,
        ends: tuple[int, ...],
        combine: Combine = "mean",
        std_weight: float = 1.0,
    ) -> None:
        self._roles, self._stamps, self._micro_batch_size, self._ends = roles, stamps, micro_batch_size, ends
        self._combine: Combine = combine
        self._std_weight = std_weight

    @property
    def members(self) -> list[Role]:
        """The roles that score, in the order of `scores`."""
        return list(self._stamps)

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        pairs = zip(self._stamps.values(), self.scores(samples), strict=True)
        rewards_MB = torch.stack([standardized(stamp, scores_B) for stamp, scores_B in pairs])
        rewards: list[float] = combined(rewards_MB, self._combine, self._std_weight).tolist()
        return rewards

    @torch.no_grad()
    def scores(self, samples: Samples) -> Tensor:
        """Return each member's scores (M, B) of prompt and completion, read at the completion's last token, fp64.

        A completion that ended with another end token than the training rows is read as if it ended with theirs,
        because the reward model was not trained on others.
        """
        samples = with_written_end(samples, self._ends)
        order: list[int] = []
        parts: list[Tensor] = []
        for rows in micro_batches(samples, self._micro_batch_size):
            batch = trim(samples, rows)
            parts.append(
                member_scores(
                    self._roles,
                    self.members,
                    batch.ids_BL,
                    batch.mask_BL,
                    batch.answers_BL,
                    batch.lower_hidden_BLD,
                    batch.shared_prompts,
                )
            )
            order += rows
        found_MB = torch.cat(parts, 1).double().cpu()  # all at once, because the host waits for a GPU here
        scores_MB = torch.zeros_like(found_MB)
        scores_MB[:, order] = found_MB
        return scores_MB


def standardized(stamp: Stamp, scores_B: Tensor) -> Tensor:
    """Return a member's rewards, in standard deviations from the mean of its training rows."""
    rewards_B = scores_B.sigmoid() if stamp.reward_is_probability else scores_B
    return (rewards_B - stamp.reward_mean) / stamp.reward_std


def combined(rewards_MB: Tensor, combine: Combine, std_weight: float) -> Tensor:
    """Combine the rewards of several members (Coste et al. 2023, arXiv 2310.02743: mean, UWO and WCO).

    Args:
        std_weight: λ in mean - λ std over the members.
    """
    match combine:
        case "mean":
            return rewards_MB.mean(0)
        case "mean_minus_std":
            return rewards_MB.mean(0) - std_weight * rewards_MB.std(0, correction=0)
        case "min":
            return rewards_MB.amin(0)


def member_scores(
    roles: Roles,
    members: Sequence[Role],
    ids_BL: Tensor,
    mask_BL: Tensor,
    answers_BL: Tensor,
    lower_hidden_BLD: Tensor | None = None,
    prompts: SharedPrompts | None = None,
) -> Tensor:
    """Return each member's scores (M, B) of the rows; the members' shared blocks are computed once."""
    if lower_hidden_BLD is None and len(members) > 1 and roles.shared_blocks:
        lower_hidden_BLD = roles.lower_hidden(ids_BL, mask_BL)
    rows = [
        roles(
            one,
            ids_BL,
            mask_BL,
            head=one,
            lower_hidden_BLD=lower_hidden_BLD,
            prompts=prompts,
            answers_BL=answers_BL,
        ).scores_B
        for one in members
    ]
    return torch.stack(rows)


class OtherRunsModel(RewardSource):
    """A reward model on its own base, which has the policy's tokenizer."""

    name, runs_user_code = "run", False

    def __init__(self, model: RewardModel) -> None:
        self._model = model

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        """Return that model's rewards; it cannot use hidden states of the policy's lower layers."""
        return self._model.rewards(prompts, replace(samples, lower_hidden_BLD=None), texts)


def with_written_end(samples: Samples, ends: tuple[int, ...]) -> Samples:
    """Return samples in which the end token of every ended completion is the first of the end tokens."""
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
    # The lower layers' hidden states belong to the sampled tokens.
    return replace(samples, ids_BL=ids_BL, lower_hidden_BLD=None)


@torch.no_grad()
def score_rows(
    roles: Roles, members: Sequence[Role], rows: Sequence[Tokens], pad_id: int, micro_batch_size: int = 32
) -> Tensor:
    """Return each member's scores (M, N) of training rows, fp64; rows of similar length are read together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    scores_MN = torch.zeros(len(members), len(rows), dtype=torch.float64)
    for start in range(0, len(order), micro_batch_size):
        chosen = order[start : start + micro_batch_size]
        ids_BL, mask_BL = left_pad([rows[index].ids for index in chosen], pad_id, roles.device)
        answers_BL = at_the_end([rows[index].completion_length() for index in chosen], mask_BL)
        scores_MN[:, chosen] = member_scores(roles, members, ids_BL, mask_BL, answers_BL).double().cpu()
    return scores_MN
