"""The outcome of RL: changes over seeds with their intervals, and reward and gold at the same KL.

Two ways of training are compared at the same KL, because a policy farther from the reference had more room to
raise its reward (Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", plot everything
against √KL). With k_s and r_s the KL and reward of step s, both smoothed:

    K    = min over runs of max over s of k_s           the largest KL that all runs reached
    s*   = the first step with k_s ≥ K
    r(K) = r_{s*-1} + (K - k_{s*-1}) / (k_{s*} - k_{s*-1}) · (r_{s*} - r_{s*-1})

and likewise for gold. If the first step already has a KL of K, r(K) is its reward. These are rewards of
completions sampled in training, not for held-out prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perl.measure.bootstrap import Interval
from perl.measure.change import Change, equal_words, places_of
from perl.report.numbers import Spread, spread
from perl.report.runs import Group, Series
from perl.rl.results import PairedMetric, RlEval

MIN_STEPS = 5
"""Minimum number of steps of a curve."""


@dataclass(frozen=True)
class MeanChange:
    """A metric before and after a stage over runs, and the 95 % interval of its mean change if known."""

    before: Spread
    after: Spread
    interval: Interval | None
    rose_in: int
    fell_in: int

    @property
    def rise(self) -> float:
        """Mean after minus mean before."""
        return self.after.mean - self.before.mean

    @property
    def places(self) -> int:
        """Decimal places that show the change, at least two for values below 100."""
        equal = equal_words(self.interval)
        width = 0.0 if self.interval is None or equal else self.interval[1] - self.interval[0]
        largest = max(abs(self.before.mean), abs(self.after.mean))
        return max(2 if largest < 100 else 0, places_of(width or largest))

    @property
    def clear(self) -> bool | None:
        """Whether the interval excludes 0; None without an interval."""
        return None if self.interval is None else self.interval[0] > 0 or self.interval[1] < 0


def mean_change(evals: Sequence[RlEval], metric: PairedMetric) -> MeanChange | None:
    """Return a metric's change over runs, with an interval if all have one; None if a run lacks the metric."""
    changes = [change for one in evals if (change := one.change(metric)) is not None]
    return mean_of(changes) if len(changes) == len(evals) else None


def mean_of(changes: Sequence[Change]) -> MeanChange | None:
    """Return the mean change over runs, with an interval if all runs have one; None without runs."""
    before, after = spread(one.before for one in changes), spread(one.after for one in changes)
    if before is None or after is None:
        return None
    interval = interval_of_mean([one.interval for one in changes])
    rose, fell = (sum(sign * one.after > sign * one.before for one in changes) for sign in (1, -1))
    return MeanChange(before, after, interval, rose, fell)


def interval_of_mean(intervals: Sequence[Interval | None]) -> Interval | None:
    """Return the interval of the mean of independent changes; None if one is unknown."""
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    middle = sum(low + high for low, high in known) / (2 * len(known))
    half = math.sqrt(sum((high - low) ** 2 for low, high in known)) / (2 * len(known))
    return middle - half, middle + half


def window(steps: int) -> int:
    """Return the number of steps in the moving mean: a tenth of all, odd, and at least three."""
    return max(3, steps // 10 | 1)


def smooth(values: Series) -> Series:
    """Return the centred moving mean over `window` steps, fewer at the ends; NaN is ignored."""
    half, known = window(len(values)) // 2, np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(known, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(known.astype(np.float64), kernel)[half : half + len(values)]
    mean: Series = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return mean


@dataclass(frozen=True)
class Curve:
    """KL, reward and gold (NaN if unknown) of each step, smoothed."""

    kl: Series
    reward: Series
    gold: Series


def curve(metrics: Mapping[str, Series]) -> Curve | None:
    """Return the smoothed curve of a policy's metrics; None with fewer than five steps that have KL and reward."""
    if "kl" not in metrics or "reward" not in metrics:
        return None
    kl, reward = metrics["kl"], metrics["reward"]
    known = np.isfinite(kl) & np.isfinite(reward)
    if known.sum() < MIN_STEPS:
        return None
    gold = metrics.get("gold", np.full(len(kl), np.nan))
    return Curve(smooth(kl[known]), smooth(reward[known]), smooth(gold[known]))


def at_kl(kl: Series, values: Series, target: float) -> float | None:
    """Return the value where the KL first reaches the target, interpolated linearly; None if it never does."""
    known = np.isfinite(values)
    kl, values = kl[known], values[known]
    if not (kl >= target).any():
        return None
    step = int(np.argmax(kl >= target))
    around = slice(max(step - 1, 0), step + 1)
    return float(np.interp(target, kl[around], values[around]))


@dataclass(frozen=True)
class Matched:
    """Reward and gold of each run at one KL."""

    kl: float
    rewards: tuple[float | None, ...]
    golds: tuple[float | None, ...]


def match(curves: Sequence[Curve | None]) -> Matched | None:
    """Return reward and gold of all runs at the largest KL that all reached; None if a curve is missing."""
    known = [one for one in curves if one is not None]
    if not known or len(known) < len(curves):
        return None
    target = min(float(one.kl.max()) for one in known)
    rewards, golds = (
        tuple(at_kl(one.kl, getattr(one, key), target) for one in known) for key in ("reward", "gold")
    )
    return Matched(target, rewards, golds)


def match_all(groups: Sequence[Group]) -> Matched | None:
    """Return `match` of all runs, in the groups' order."""
    return match([curve(run.metrics["policy"]) for group in groups for run in group.runs])
