"""The metrics of a reward model: ranking, classification and calibration.

Scores are log-odds of a thumb up, with the threshold 0 (exactly 0 counts as down). Labels are 1 for up and 0 for
down. Pairs are indices (better, worse) into the scores.

Each metric is a function of weights, for the bootstrap (`perl.measure.bootstrap`); scikit-learn's metrics would
sort and check the scores again for each of a thousand resamples.

Axis letters: S resamples, N completions, K distinct scores in order, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perl.measure.bootstrap import Floats, Statistic, ratio

Labels = NDArray[np.int64]

ECE_BINS = 10


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Completions of similar predicted probability: mean prediction, observed share of ups, and number."""

    probability: float
    share: float
    n: int


@dataclass(frozen=True, kw_only=True)
class ScoreHistogram:
    """Counts of scores between `edges` (one more than counts), for completions rated up and rated down."""

    edges: list[float]
    up: list[int]
    down: list[int]


def checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Labels]:
    """Return scores and labels as arrays; raise ValueError if they are unusable."""
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if score.ndim != 1 or score.shape != label.shape or not len(score):
        raise ValueError(f"scores and labels must be two lists of one length, not {score.shape} and {label.shape}")
    if not np.isfinite(score).all():
        raise ValueError(f"{(~np.isfinite(score)).sum()} of {len(score)} scores are not finite")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 (down) or 1 (up)")
    return score, label.astype(np.int64)


def auroc(scores: Floats, labels: Labels, strata: NDArray[np.int64] | None = None) -> Statistic:
    """Return how often an up scores higher than a down, ties counting half; NaN if all labels are equal.

    Args:
        strata: stratum of each completion; only completions of the same stratum are compared. Default: all are.
    """
    stratum = np.zeros(len(scores), dtype=np.int64) if strata is None else strata
    groups = [np.flatnonzero(stratum == one) for one in np.unique(stratum)]
    ordered = [rows[np.argsort(scores[rows], kind="stable")] for rows in groups]
    starts = [_starts(scores[rows]) for rows in ordered]

    def statistic(weights_SN: Floats) -> Floats:
        right_S, compared_S = np.zeros(len(weights_SN)), np.zeros(len(weights_SN))
        for rows, first in zip(ordered, starts, strict=True):
            drawn_SN, up_N = weights_SN[:, rows], labels[rows]
            up_SK = np.add.reduceat(drawn_SN * up_N, first, axis=1)
            down_SK = np.add.reduceat(drawn_SN * (1 - up_N), first, axis=1)
            lower_SK = down_SK.cumsum(axis=1) - down_SK / 2
            right_S += (up_SK * lower_SK).sum(axis=1)
            compared_S += up_SK.sum(axis=1) * down_SK.sum(axis=1)
        return ratio(right_S, compared_S)

    return statistic


def _starts(ordered: Floats) -> NDArray[np.int64]:
    """Return the first index of each distinct value of a sorted array."""
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def accuracy(scores: Floats, labels: Labels) -> Statistic:
    """Return the share of completions on the right side of 0."""
    right_N = ((scores > 0) == labels).astype(np.float64)
    return lambda weights_SN: ratio(weights_SN @ right_N, weights_SN.sum(axis=1))


def balanced_accuracy(scores: Floats, labels: Labels) -> Statistic:
    """Return the mean of the accuracies on ups and on downs; if all labels are equal, the accuracy on those."""
    right_N = ((scores > 0) == labels).astype(np.float64)
    is_up_N, is_down_N = labels.astype(np.float64), 1.0 - labels

    def statistic(weights_SN: Floats) -> Floats:
        up_S = ratio(weights_SN @ (right_N * is_up_N), weights_SN @ is_up_N)
        down_S = ratio(weights_SN @ (right_N * is_down_N), weights_SN @ is_down_N)
        return np.where(np.isnan(up_S), down_S, np.where(np.isnan(down_S), up_S, (up_S + down_S) / 2))

    return statistic


def pairwise_accuracy(scores: Floats, pairs: Sequence[tuple[int, int]]) -> Statistic:
    """Return the share of pairs whose better completion scores higher, ties half; its weight is the pair's."""
    better_P, worse_P = np.asarray(pairs, dtype=np.int64).T
    of_pairs = share_right(scores[better_P] - scores[worse_P])
    return lambda weights_SN: of_pairs(weights_SN[:, better_P])


def share_right(differences_P: Floats) -> Statistic:
    """Return the weighted share of pairs whose score difference, better minus worse, is positive, ties half."""
    right_P = np.heaviside(differences_P, 0.5)
    return lambda weights_SP: ratio(weights_SP @ right_P, weights_SP.sum(axis=1))


def calibration_error(scores: Floats, labels: Labels) -> float:
    """Return the ECE, the mean distance of predicted probability and share of ups over bins: Σ n_b/n |p̄_b - ȳ_b|.

    The ten bins have equal mass (Nguyen & O'Connor 2015; less biased, Roelofs et al. 2022), because a reward
    model's probabilities cluster; equal scores share a bin. The estimate is biased upwards on few completions, and
    more so on resamples, in which completions repeat, so there is no bootstrap interval.
    """
    bins = reliability(scores, labels)
    return sum(one.n * abs(one.probability - one.share) for one in bins) / len(scores)


def reliability(scores: Floats, labels: Labels) -> list[ReliabilityBin]:
    """Return predicted probability and observed share of ups, by bins as in `calibration_error`."""
    bins, p = equal_mass(scores, ECE_BINS), probabilities(scores)
    return [
        ReliabilityBin(probability=float(p[rows].mean()), share=float(labels[rows].mean()), n=int(rows.sum()))
        for rows in (bins == one for one in np.unique(bins))
    ]


def score_histogram(scores: Floats, labels: Labels, bins: int = 24) -> ScoreHistogram:
    """Return the histogram of the scores of each label, in bins of equal width."""
    edges = np.histogram_bin_edges(scores, bins)
    up, down = (np.histogram(scores[labels == one], edges)[0].tolist() for one in (1, 0))
    return ScoreHistogram(edges=edges.tolist(), up=up, down=down)


def probabilities(scores: Floats) -> Floats:
    """Return the sigmoid, without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(scores / 2)))


def equal_mass(values: Floats, bins: int) -> NDArray[np.int64]:
    """Return the bin of each value, with about equal numbers per bin; equal values share a bin."""
    rank = np.searchsorted(np.sort(values), values, side="left")
    return np.asarray(rank * bins // len(values))
