"""Changes of a metric between two models on the same prompts or rows, with paired 95 % intervals.

Whole dialogues are resampled (`perl.measure.bootstrap`). For G dialogues the bootstrap's variance is (G - 1) / G
of the variance that it estimates, and the estimate itself is uncertain. The percentiles' distance from the mean is
therefore multiplied by t · √(G / (G - 1)) / z, where t and z are quantiles of Student's distribution with G - 1
degrees of freedom and of the normal distribution (as in Hesterberg 2015, "What Teachers Should Know About the
Bootstrap").

A loss is a mean over tokens, so rows are weighted by their numbers of tokens: the statistic of each resample is
the sum of changes divided by the number of tokens.

Axis letters: S resamples, N prompts or rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from perl.measure.bootstrap import ClusterBootstrap, Floats, Interval, ratio
from perl.measure.change import Change

Metrics = Mapping[str, Sequence[float]]
"""Values of each prompt, by the metric's name."""


@dataclass(frozen=True)
class TokenLosses:
    """Losses of rows: for each row, the sum of -log p over its tokens, in nats, and its number of tokens."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Mean over the tokens of all rows."""
        return sum(self.sums) / sum(self.tokens)

    def interval_to(self, after: "TokenLosses", dialogues: Sequence[str]) -> Interval | None:
        """Return the 95 % interval of the mean's change to other losses of the same rows.

        None with a single dialogue or if a loss is not finite.
        """
        change_N, size_N = np.subtract(after.sums, self.sums), np.asarray(self.tokens, dtype=np.float64)
        return _interval(change_N, size_N, ClusterBootstrap(dialogues, seed=0), len(set(dialogues)))


def changes(before: Metrics, after: Metrics, dialogues: Sequence[str]) -> dict[str, Change]:
    """Return the change of each metric's mean over the prompts; its interval is None with a single dialogue.

    Args:
        before: the metrics of each prompt; `dialogues` likewise has one entry per prompt.
        after: those of the same prompts in the same order, under the same names.
    """
    bootstrap, size_N = ClusterBootstrap(dialogues, seed=0), np.ones(len(dialogues))
    changed: dict[str, Change] = {}
    for name, values in before.items():
        before_N, after_N = np.asarray(values, dtype=np.float64), np.asarray(after[name], dtype=np.float64)
        interval = _interval(after_N - before_N, size_N, bootstrap, len(set(dialogues)))
        changed[name] = Change(float(before_N.mean()), float(after_N.mean()), interval)
    return changed


def _interval(change_N: Floats, size_N: Floats, bootstrap: ClusterBootstrap, dialogues: int) -> Interval | None:
    """Return the interval of the sum of changes divided by the sum of sizes."""
    if dialogues < 2 or not np.isfinite(change_N).all():
        return None
    mean = float(change_N.sum() / size_N.sum())
    interval = bootstrap.estimate(lambda weights_SN: ratio(weights_SN @ change_N, weights_SN @ size_N)).interval
    assert interval is not None
    wider = float(t.ppf(0.975, dialogues - 1) / norm.ppf(0.975)) * math.sqrt(dialogues / (dialogues - 1))
    low, high = interval
    return mean - wider * (mean - low), mean + wider * (high - mean)
