"""Confidence intervals: the bootstrap by dialogue, all resamples at once.

A statistic is a function of weights_SN (float64): how often each of N rows was drawn in each of S resamples. It
returns S values, NaN where a resample has none (such as an AUROC without downs). `scipy.stats.bootstrap` draws
single rows, and has no interval where one resample has no value.

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
"""At least and at most; fewer where there are many rows."""
MAX_WEIGHTS = 20_000_000
"""Resamples times rows: about a second for a statistic."""
CHUNK = 4_000_000
"""Weights in memory at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic and its 95 % interval; None where it has no value."""

    value: float | None
    interval: Interval | None


class ClusterBootstrap:
    """Whole dialogues drawn with replacement (Field & Welsh 2007), the same draws for every statistic.

    The rows of a dialogue are not independent: drawn one by one they would give intervals that are too narrow. As
    all statistics see the same draws, the interval of a difference of two is a paired one.

    Args:
        dialogues: of each row.
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
        """The statistic of the rows as they are, and the 2.5th and 97.5th percentiles of its resamples."""
        rows = len(self._dialogue_N)
        step = max(1, CHUNK // rows)
        chunks = (self._times_SG[first : first + step] for first in range(0, len(self._times_SG), step))
        values = np.concatenate([statistic(times[:, self._dialogue_N].astype(np.float64)) for times in chunks])
        known = values[np.isfinite(values)]
        low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan)
        return Estimate(value_of(statistic, rows), (float(low), float(high)) if len(known) else None)


def value_of(statistic: Statistic, rows: int) -> float | None:
    """The statistic of so many rows as they are; None where it has no value."""
    value = float(statistic(np.ones((1, rows)))[0])
    return value if np.isfinite(value) else None


def ratio(numerator_S: Floats, denominator_S: Floats) -> Floats:
    """Element by element; NaN where the denominator is 0."""
    out = np.full(len(denominator_S), np.nan)
    values: Floats = np.divide(numerator_S, denominator_S, out=out, where=denominator_S > 0)
    return values
