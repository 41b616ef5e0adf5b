"""DAPO's dynamic sampling: groups whose rewards are all equal are replaced by groups of other prompts.

Yu et al. 2025, arXiv 2503.14476, section 3.2. The number of redraws is bounded: if too few groups differ, equal
ones fill the rollout, and their tokens are not trained on.

Axis letter: B completions.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from perl.rl.algorithm import ROUNDING
from perl.rl.maths import equal_groups
from perl.rl.rollout import Rollout


def differing(rollout: Rollout) -> Tensor:
    """Return, as bool (B), whether the rewards of a completion's group differ by a share of the largest."""
    size = float(rollout.rewards_B.abs().max()) or 1.0
    return ~equal_groups(rollout.rewards_B / size, rollout.group_size, ROUNDING)


def assembled(drawn: Sequence[Rollout], completions: int) -> Rollout:
    """Return the first `completions` completions of several rollouts, groups whose rewards differ first."""
    rollout = joined(drawn)
    differ = [keeps for one in drawn for keeps in differing(one).tolist()]
    order = sorted(range(len(differ)), key=lambda row: not differ[row])[:completions]  # stable: groups stay whole
    return rollout.take(order)


def joined(drawn: Sequence[Rollout]) -> Rollout:
    """Return several rollouts as one, with distinct group numbers."""
    columns = max(one.ids_BL.shape[1] for one in drawn)
    parts = [one.widened(columns) for one in drawn]
    groups: list[int] = []
    for one in drawn:
        first = max(groups, default=-1) + 1
        groups += [first + group for group in one.groups]
    values: dict[str, Any] = Rollout.joined([vars(part) for part in parts], len(groups), parts[0].ids_BL.device)
    return Rollout(**values | {"groups": groups})
