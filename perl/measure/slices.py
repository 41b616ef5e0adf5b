"""The metrics of a reward model by kind of completion, depth of dialogue, length and source.

A pair belongs to the slices of its better completion.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perl.measure.bootstrap import ClusterBootstrap, Estimate, Floats, Interval, Statistic
from perl.measure.metrics import calibration_error, equal_mass
from perl.measure.ranking import Ranking
from perl.measure.rated_rows import RatedRows

MIN_JUDGED = 30
"""Smaller slices are counted, but have no metrics."""
PARTS = 3
SOURCES = 10
"""Number of most frequent sources that are listed."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Completions or pairs of one kind; fewer than `MIN_JUDGED` are only counted. The ECE is after scaling.

    Attributes:
        share_up: None for pairs.
        auroc: for pairs, the pairwise accuracy.
    """

    by: str
    name: str
    n: int
    share_up: float | None
    auroc: float | None = None
    interval: Interval | None = None
    ece: float | None = None


def slices(ranking: Ranking, calibrated: Floats | None, bootstrap: ClusterBootstrap) -> list[Slice]:
    """Return each slice with its metrics.

    Args:
        calibrated: log-odds of a thumb up, each fitted on other dialogues; None for pairs.
    """
    labels, compared = np.asarray(ranking.rows.labels, dtype=np.int64), ranking.compared
    result = []
    for by, name, indices in _cuts(ranking.rows, "better answer" if compared else "answer"):
        ranked, ece = Estimate(None, None), None
        up = ranking.truth_N[indices]
        if len(indices) >= MIN_JUDGED and (compared or up.min() != up.max()):
            statistic = ranking.statistic(ranking.score_N[indices], up)
            ranked = bootstrap.estimate(_within(indices, statistic))
            if calibrated is not None:
                ece = calibration_error(calibrated[indices], labels[indices])
        n, share = len(indices), None if compared else float(up.mean())
        result.append(
            Slice(by=by, name=name, n=n, share_up=share, auroc=ranked.value, interval=ranked.interval, ece=ece)
        )
    return result


def _within(indices: Indices, statistic: Statistic) -> Statistic:
    return lambda weights_SN: statistic(weights_SN[:, indices])


def _cuts(rows: RatedRows, answer: str) -> Iterator[tuple[str, str, Indices]]:
    """Yield each slice's criterion, its name, and its completions, which the criterion calls `answer`."""
    calls = np.array([answer.is_call for answer in rows.answers])
    for name, chosen in (("API call", calls), ("text", ~calls)):
        if chosen.any():
            yield f"kind of {answer}", name, np.flatnonzero(chosen)
    yield from _thirds("depth of dialogue", "turns before", [len(context) for context in rows.contexts])
    yield from _thirds(f"length of {answer}", "characters", [len(answer.text) for answer in rows.answers])
    sources = np.array(rows.sources)
    for source, _ in Counter(rows.sources).most_common(SOURCES):
        yield "source", source, np.flatnonzero(sources == source)


def _thirds(by: str, unit: str, counts: list[int]) -> Iterator[tuple[str, str, Indices]]:
    """Yield thirds of the completions; equal counts share a third."""
    values = np.array(counts)
    thirds = equal_mass(values.astype(np.float64), PARTS)
    for third in np.unique(thirds):
        indices = np.flatnonzero(thirds == third)
        low, high = values[indices].min(), values[indices].max()
        yield by, f"{low} {unit}" if low == high else f"{low} to {high} {unit}", indices
