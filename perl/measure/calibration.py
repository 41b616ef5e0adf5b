"""Calibration: scores scaled to probabilities after training, and evaluated on dialogues not used for the fit.

A reward model of thumbs is trained with balanced classes, so its log-odds are shifted by those of the data's share
of ups, and like most networks it is overconfident. Scaling corrects both without changing the ranking:

    p = σ(a s + b)        Platt 1999
    p = σ(s / T)          temperature scaling, Guo et al. 2017: the slope alone, which cannot change the share

Both are fitted by maximum likelihood, with Platt's targets: (n₊ + 1) / (n₊ + 2) for an up and 1 / (n₋ + 2) for a
down instead of 1 and 0, so that the slope is finite even for scores that separate the classes.

The probability is that of a thumb up, so it is compared with thumbs even if there is a gold judge. For compared
completions it is the probability that the first of two is better, σ(s₁ - s₂).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perl.measure.bootstrap import Floats
from perl.measure.metrics import (
    ECE_BINS,
    Labels,
    ReliabilityBin,
    calibration_error,
    equal_mass,
    probabilities,
    reliability,
)
from perl.measure.rated_rows import RatedRows

FOLDS = 5
LABEL_DRAWS = 400
"""Number of sets of labels drawn from the probabilities."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Probabilities before and after scaling, p = σ(slope · score + intercept).

    Slope, intercept and temperature are fitted on all completions; each ECE after scaling uses log-odds fitted on
    other dialogues (None if there is only one dialogue).
    """

    of: str
    n: int
    slope: float
    intercept: float
    temperature: float | None
    ece_before: float
    ece_temperature: float | None
    ece_after: float | None
    ece_by_chance: float | None
    reliability_before: list[ReliabilityBin]
    reliability_after: list[ReliabilityBin] | None


@dataclass(frozen=True, slots=True)
class Scaling:
    """Scores as calibrated log-odds: slope · score + intercept."""

    slope: float
    intercept: float

    def __call__(self, scores: Floats) -> Floats:
        """Return the calibrated log-odds."""
        return self.slope * scores + self.intercept


def fit(scores: Floats, labels: Labels, intercept: bool = True) -> Scaling:
    """Fit the scaling by maximum likelihood; without an intercept, only the temperature."""
    from sklearn.linear_model import LogisticRegression  # takes 2 s to import, not needed to read a card

    # Standardized (without an intercept only scaled), the solver converges fast.
    shift = float(scores.mean()) if intercept else 0.0
    unit = float(np.sqrt(np.mean((scores - shift) ** 2))) or 1.0
    x = ((scores - shift) / unit)[:, None]
    ups = int(labels.sum())
    share_N = np.where(labels == 1, (ups + 1) / (ups + 2), 1 / (len(labels) - ups + 2))
    # A target between 0 and 1 is two weighted rows, one of each label.
    model = LogisticRegression(C=np.inf, fit_intercept=intercept, tol=1e-8, max_iter=1000)
    both = np.repeat([1, 0], len(x))
    model.fit(np.concatenate([x, x]), both, sample_weight=np.concatenate([share_N, 1 - share_N]))
    slope = float(model.coef_[0, 0]) / unit
    return Scaling(slope, float(np.ravel(model.intercept_)[0]) - slope * shift if intercept else 0.0)


def cross_fitted(
    scores: Floats, labels: Labels, dialogues: Sequence[str], intercept: bool = True
) -> Floats | None:
    """Return log-odds, each scaled by a fit on other dialogues than its own; None with a single dialogue."""
    from sklearn.model_selection import GroupKFold

    groups = np.unique(np.asarray(dialogues), return_inverse=True)[1]
    folds = min(FOLDS, int(groups.max()) + 1)
    if folds < 2:
        return None
    scaled = np.empty_like(scores)
    for others, own in GroupKFold(folds).split(scores, groups=groups):
        scaled[own] = fit(scores[others], labels[others], intercept)(scores[own])
    return scaled


def ece_by_chance(log_odds: Floats, seed: int) -> float:
    """Return the 95th percentile of the ECE that exact probabilities have on this many completions.

    Labels are drawn from the probabilities themselves (consistency resampling, Bröcker & Smith 2007).
    """
    p, bins = probabilities(log_odds), equal_mass(log_odds, ECE_BINS)
    generator = np.random.default_rng(seed)
    gaps = (np.bincount(bins, weights=p - (generator.random(len(p)) < p)) for _ in range(LABEL_DRAWS))
    return float(np.percentile([np.abs(gap).sum() / len(p) for gap in gaps], 95))


@dataclass(frozen=True)
class Predictions:
    """Events with a probability: a completion's thumb up, or the first of two completions being better."""

    scores: Floats
    labels: Labels
    dialogues: list[str]
    compared: bool


def predictions(scores: Floats, rows: RatedRows) -> Predictions:
    """Return rated completions, or compared ones as differences, with every other pair reversed."""
    if not rows.compared:
        return Predictions(scores, np.asarray(rows.labels, dtype=np.int64), rows.dialogues, False)
    better, worse = np.asarray(rows.pairs, dtype=np.int64).T
    first = np.arange(len(better)) % 2 == 0  # if the better were always first, overconfidence would be right
    differences = np.where(first, 1.0, -1.0) * (scores[better] - scores[worse])
    return Predictions(differences, first.astype(np.int64), [rows.dialogues[index] for index in better], True)


def calibrate(given: Predictions) -> tuple[Calibration, Floats | None]:
    """Return the calibration before and after scaling, and the scaled log-odds, each fitted on other dialogues."""
    scores, labels, dialogues = given.scores, given.labels, given.dialogues
    scaling = fit(scores, labels, intercept=not given.compared)
    tempered = fit(scores, labels, intercept=False)
    after = cross_fitted(scores, labels, dialogues, intercept=not given.compared)
    by_temperature = cross_fitted(scores, labels, dialogues, intercept=False)
    calibration = Calibration(
        of="the first of two being the better" if given.compared else "a thumb up",
        n=len(scores),
        slope=scaling.slope,
        intercept=scaling.intercept,
        temperature=1 / tempered.slope if tempered.slope > 0 else None,
        ece_before=calibration_error(scores, labels),
        ece_temperature=None if by_temperature is None else calibration_error(by_temperature, labels),
        ece_after=None if after is None else calibration_error(after, labels),
        ece_by_chance=None if after is None else ece_by_chance(after, seed=0),
        reliability_before=reliability(scores, labels),
        reliability_after=None if after is None else reliability(after, labels),
    )
    return calibration, after
