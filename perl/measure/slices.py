"""Where the reward model is good and where not: its metrics by kind of answer, depth, length and source."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perl.measure.answers import Answers
from perl.measure.bootstrap import Figure, Floats, Resampled, plain
from perl.measure.metrics import Labels, auroc, calibration_error, equal_mass

LEAST = 30
"""Smaller slices are counted, not judged."""
PARTS = 3
SOURCES = 10
"""The commonest sources are listed."""

Rows = NDArray[np.int64]


def slices(
    scores: Floats, truth: Labels, calibrated: Floats | None, answers: Answers, resampled: Resampled
) -> list[dict[str, Any]]:
    """Each slice with its size and share of ups, AUROC with interval, and ECE after scaling.

    Args:
        calibrated: log-odds of a thumb up, each fitted on other dialogues; None where answers were compared.
    """
    labels = np.asarray(answers.labels, dtype=np.int64)
    found = []
    for by, name, rows in _cuts(answers):
        of_slice: dict[str, Any] = {"by": by, "name": name, "n": len(rows), "share_up": float(truth[rows].mean())}
        if len(rows) >= LEAST and truth[rows].min() != truth[rows].max():
            ranked = resampled.estimate(_within(rows, auroc(scores[rows], truth[rows])))
            of_slice |= {"auroc": ranked.value, "interval": ranked.interval}
            if calibrated is not None:
                of_slice["ece"] = plain(calibration_error(calibrated[rows], labels[rows]), len(rows))
        found.append(of_slice)
    return found


def _within(rows: Rows, figure: Figure) -> Figure:
    return lambda weights_SN: figure(weights_SN[:, rows])


def _cuts(answers: Answers) -> Iterator[tuple[str, str, Rows]]:
    """What the slice is by, its name, and its answers."""
    calls = np.array([answer.is_call for answer in answers.answers])
    for name, chosen in (("API call", calls), ("text", ~calls)):
        if chosen.any():
            yield "kind of answer", name, np.flatnonzero(chosen)
    yield from _parts("depth of dialogue", "turns before", [len(context) for context in answers.contexts])
    yield from _parts("length of answer", "characters", [len(answer.text) for answer in answers.answers])
    sources = np.array(answers.sources)
    for source, _ in Counter(answers.sources).most_common(SOURCES):
        yield "source", source, np.flatnonzero(sources == source)


def _parts(by: str, unit: str, counts: list[int]) -> Iterator[tuple[str, str, Rows]]:
    """Thirds of the answers; equal counts share one."""
    values = np.array(counts)
    thirds = equal_mass(values.astype(np.float64), PARTS)
    for third in np.unique(thirds):
        rows = np.flatnonzero(thirds == third)
        low, high = values[rows].min(), values[rows].max()
        yield by, f"{low} {unit}" if low == high else f"{low} to {high} {unit}", rows
