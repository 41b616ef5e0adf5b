"""How sure a figure is: the bootstrap by dialogue, all resamples at once.

A figure is a function of weights_SN (float64): S resamples of N answers, how often each answer was drawn. It
returns S values, NaN where a resample has none (such as an AUROC without downs).

Axis letters: S resamples, N answers, G dialogues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Figure = Callable[[Floats], Floats]
Interval = tuple[float, float]

RESAMPLES = (200, 1000)
"""At least and at most: the more answers, the fewer."""
WEIGHTS = 20_000_000
"""Resamples times answers: what a figure takes a second or so to go through."""
HELD = 4_000_000
"""Of these in memory at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; None where it has no value."""

    value: float | None
    interval: Interval | None


class Resampled:
    """Whole dialogues drawn with replacement (Field & Welsh 2007), the same draws for every figure.

    The answers of one dialogue resemble one another; drawing them one by one would give intervals that are too
    narrow. As all metrics see the same draws, the interval of a difference of two metrics is a paired one.

    Args:
        dialogues: of each answer.
        seed: of the draws.
    """

    def __init__(self, dialogues: Sequence[str] | Sequence[int], seed: int) -> None:
        _, self._dialogue_N = np.unique(np.asarray(dialogues), return_inverse=True)
        count = int(self._dialogue_N.max()) + 1
        least, most = RESAMPLES
        samples = min(most, max(least, WEIGHTS // len(dialogues)))
        random = np.random.default_rng(seed)
        self._times_SG = np.empty((samples, count), dtype=np.int16)  # no dialogue is drawn thousands of times
        for times_G in self._times_SG:
            times_G[:] = np.bincount(random.integers(count, size=count), minlength=count)

    def estimate(self, figure: Figure) -> Estimate:
        """The figure of the answers as they are, and between which values 95 % of its resamples lie."""
        answers = len(self._dialogue_N)
        value = float(figure(np.ones((1, answers)))[0])
        step = max(1, HELD // answers)
        parts = [
            figure(self._times_SG[first : first + step, self._dialogue_N].astype(np.float64))
            for first in range(0, len(self._times_SG), step)
        ]
        values = np.concatenate(parts)
        known = values[np.isfinite(values)]
        low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan)
        return Estimate(
            value=value if np.isfinite(value) else None,
            interval=(float(low), float(high)) if len(known) else None,
        )


def plain(figure: Figure, answers: int) -> float | None:
    """The figure of so many answers as they are; None where it has no value."""
    value = float(figure(np.ones((1, answers)))[0])
    return value if np.isfinite(value) else None


def ratio(parts_S: Floats, whole_S: Floats) -> Floats:
    """Parts over wholes; NaN where the whole is 0."""
    values: Floats = np.divide(parts_S, whole_S, out=np.full(len(whole_S), np.nan), where=whole_S > 0)
    return values
