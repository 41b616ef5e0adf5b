"""What runs of one tuning came to: figures over seeds, and how sure the change is."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from perl.page.numbers import Spread, spread
from perl.page.runs import Run
from perl.page.schema import Interval, RewardEval, RlEval

Z = 1.96
"""A 95 % interval is this many standard errors to either side."""
STAGE = {"sft": "SFT", "reward": "Reward", "rl": "RL"}
TUNING = {"lora": "LoRA", "full": "Full tuning"}


@dataclass(frozen=True)
class Group:
    """The runs of one tuning, one a seed."""

    tuning: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The tuning in words."""
        return TUNING[self.tuning]

    @property
    def rl(self) -> list[RlEval]:
        """The RL figures of the runs that have them."""
        stages = (run.report.stages.rl for run in self.runs)
        return [stage.eval for stage in stages if stage is not None]

    @property
    def reward(self) -> list[RewardEval]:
        """The reward model's cards of the runs that have one."""
        stages = (run.report.stages.reward for run in self.runs)
        return [stage.eval for stage in stages if stage is not None]

    def over_runs(self, figure: Callable[[Run], float | None]) -> Spread | None:
        """A figure's mean and spread over the runs that have it."""
        return spread(figure(run) for run in self.runs)


@dataclass(frozen=True)
class Change:
    """A figure before and after RL, the mean over runs, and the 95 % interval of its rise where one is known."""

    before: Spread
    after: Spread
    interval: Interval | None
    rose_in: int

    @property
    def rise(self) -> float:
        """Mean after less mean before."""
        return self.after.mean - self.before.mean

    @property
    def clear(self) -> bool | None:
        """Whether the interval leaves 0 out; None without an interval."""
        return None if self.interval is None else self.interval[0] > 0 or self.interval[1] < 0


def groups(runs: Iterable[Run]) -> list[Group]:
    """The runs by tuning, LoRA first, by seed within each."""
    ordered = sorted(runs, key=lambda run: run.report.seed)
    by_tuning = {tuning: tuple(run for run in ordered if run.report.tuning == tuning) for tuning in TUNING}
    return [Group(tuning, members) for tuning, members in by_tuning.items() if members]


def gold_change(evals: Sequence[RlEval]) -> Change | None:
    """The gold judge's share before and after; None if any run lacks it.

    The interval is the report's own (of paired answers) where it has one, else that of `share_interval`.
    """
    pairs = [(one.gold_before, one.gold_after, one.n) for one in evals]
    known = [(before, after, n) for before, after, n in pairs if before is not None and after is not None]
    if not known or len(known) < len(pairs):
        return None
    rises = [
        share_interval(before, after, n) if one.gold_change_interval is None else _middle(one.gold_change_interval)
        for one, (before, after, n) in zip(evals, known, strict=True)
    ]
    middle = sum(rise for rise, _ in rises) / len(rises)
    error = math.sqrt(sum(error**2 for _, error in rises)) / len(rises)
    return _change([(before, after) for before, after, _ in known], (middle - Z * error, middle + Z * error))


def _middle(interval: Interval) -> tuple[float, float]:
    """The middle of a 95 % interval, and its standard error."""
    low, high = interval
    return (low + high) / 2, (high - low) / (2 * Z)


def share_interval(before: float, after: float, n: int) -> tuple[float, float]:
    """The rise of a share between two sets of n answers, and its standard error.

    Agresti and Caffo 2000, one success and one failure added to each set: p̃ = (p n + 1) / (n + 2), rise
    p̃_2 - p̃_1, variance Σ p̃ (1 - p̃) / (n + 2). It takes the sets as independent; they answer the same prompts,
    which makes the interval, if anything, too wide.
    """
    first, second = ((share * n + 1) / (n + 2) for share in (before, after))
    return second - first, math.sqrt((first * (1 - first) + second * (1 - second)) / (n + 2))


def reward_change(evals: Sequence[RlEval]) -> Change | None:
    """The reward before and after; with an interval only where every run has those of both."""
    if not evals:
        return None
    rises = [(one.reward_after - one.reward_before, _error(one)) for one in evals]
    errors = [error for _, error in rises if error is not None]
    interval = None
    if len(errors) == len(rises):
        middle = sum(rise for rise, _ in rises) / len(rises)
        error = math.sqrt(sum(error**2 for error in errors)) / len(errors)
        interval = (middle - Z * error, middle + Z * error)
    return _change([(one.reward_before, one.reward_after) for one in evals], interval)


def loss_change(group: Group) -> Change | None:
    """The loss on held-out answers before and after SFT; None without SFT."""
    stages = [run.report.stages.sft for run in group.runs]
    pairs = [(stage.eval.loss_before, stage.eval.loss_after) for stage in stages if stage is not None]
    return _change(pairs, None) if pairs else None


def _error(one: RlEval) -> float | None:
    """The standard error of the reward's rise, from its interval or those of both ends."""
    if one.reward_change_interval is not None:
        return _middle(one.reward_change_interval)[1]
    before, after = one.reward_before_interval, one.reward_after_interval
    if before is None or after is None:
        return None
    return math.hypot(before[1] - before[0], after[1] - after[0]) / (2 * Z)


def _change(pairs: Sequence[tuple[float, float]], interval: Interval | None) -> Change:
    before, after = spread(one for one, _ in pairs), spread(one for _, one in pairs)
    assert before is not None
    assert after is not None
    return Change(before, after, interval, sum(after > before for before, after in pairs))


def recipe_differences(runs: Sequence[Run]) -> list[str]:
    """The recipe keys, seed aside, in which runs of one tuning differ."""
    recipes = [_flat(run.recipe) for run in runs if run.recipe]
    keys = {key for recipe in recipes for key in recipe} - {"seed"}
    return sorted(key for key in keys if any(one.get(key) != recipes[0].get(key) for one in recipes))


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
