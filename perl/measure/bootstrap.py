"""Confidence intervals by the bootstrap over dialogues, all resamples at once.

A statistic is a function of weights_SN (float64), the number of times that each of N rows was drawn in each of S
resamples. It returns S values, NaN for undefined ones (such as an AUROC without downs). `scipy.stats.bootstrap`
draws single rows, and has no interval if a resample has no value.

Axis letters: S resamples, N rows, G dialogues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
Interval = tuple[float, float]

RESAMPLES = (200, 1000)
"""Smallest and largest number of resamples; fewer are used if there are many rows."""
MAX_WEIGHTS = 20_000_000
"""Largest product of resamples and rows, about one second per statistic."""
CHUNK = 4_000_000
"""Number of weights in memory at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic and its 95 % interval; None if undefined."""

    value: float | None
    interval: Interval | None


class ClusterBootstrap:
    """Whole dialogues drawn with replacement (Field & Welsh 2007), the same draws for every statistic.

    The rows of a dialogue are not independent: drawing them one by one would give intervals that are too narrow.
    Because all statistics use the same draws, the interval of a difference of two statistics is paired.

    Args:
        dialogues: the dialogue of each row.
    """

    def __init__(self, dialogues: Sequence[str] | Sequence[int], seed: int) -> None:
        _, self._dialogue_N = np.unique(np.asarray(dialogues), return_inverse=True)
        count = int(self._dialogue_N.max()) + 1
        least, most = RESAMPLES
        samples = min(most, max(least, MAX_WEIGHTS // len(dialogues)))
        random = np.random.default_rng(seed)
        self._times_SG = np.empty((samples, count), dtype=np.int16)  # no dialogue is drawn thousands of times
        for times_G in self._times_SG:
            times_G[:] = np.bincount(random.integers(count, size=count), minlength=count)

    def estimate(self, statistic: Statistic) -> Estimate:
        """Return the statistic of the original rows, and the 2.5th and 97.5th percentiles over the resamples."""
        rows = len(self._dialogue_N)
        step = max(1, CHUNK // rows)
        chunks = (self._times_SG[first : first + step] for first in range(0, len(self._times_SG), step))
        values = np.concatenate([statistic(times[:, self._dialogue_N].astype(np.float64)) for times in chunks])
        known = values[np.isfinite(values)]
        low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan)
        return Estimate(value_of(statistic, rows), (float(low), float(high)) if len(known) else None)


def value_of(statistic: Statistic, rows: int) -> float | None:
    """Return the statistic of `rows` original rows; None if undefined."""
    value = float(statistic(np.ones((1, rows)))[0])
    return value if np.isfinite(value) else None


def ratio(numerator_S: Floats, denominator_S: Floats) -> Floats:
    """Return the elementwise ratio; NaN where the denominator is 0."""
    out = np.full(len(denominator_S), np.nan)
    values: Floats = np.divide(numerator_S, denominator_S, out=out, where=denominator_S > 0)
    return values
