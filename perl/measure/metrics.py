"""How good a reward model is: its report card, and how sure its figures are.

Scores are log-odds of a thumb up: the probability is their sigmoid, the threshold 0 (a score of exactly 0
counts as down). Labels are 1 for up and 0 for down. Pairs are indices (better, worse) into the scores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]
Metric = Callable[[Scores, Labels], float | None]

ECE_BINS = 10


@dataclass(frozen=True, slots=True)
class RewardMetrics:
    """The report card of a reward model on rated answers."""

    n: int
    auroc: float | None
    """None where all labels are alike."""
    balanced_accuracy: float
    accuracy: float
    majority_accuracy: float
    """What always giving the commoner label would score: the figure that accuracy has to beat."""
    ece: float
    pairwise_accuracy: float | None
    """None without pairs."""

    def as_json(self) -> dict[str, float | int | None]:
        """The metrics by name; `pairwise_accuracy` only where there were pairs."""
        metrics: dict[str, float | int | None] = asdict(self)
        if self.pairwise_accuracy is None:
            del metrics["pairwise_accuracy"]
        return metrics


def reward_metrics(
    scores: ArrayLike, labels: ArrayLike, pairs: Sequence[tuple[int, int]] | None = None
) -> RewardMetrics:
    """All metrics of a reward model.

    Args:
        scores: log-odds, finite, one an answer.
        labels: 1 or True for up, 0 or False for down.
        pairs: indices (better, worse) into `scores`.
    """
    score, label = _checked(scores, labels)
    up = float(label.mean())
    return RewardMetrics(
        n=len(score),
        auroc=auroc(score, label),
        balanced_accuracy=balanced_accuracy(score, label),
        accuracy=accuracy(score, label),
        majority_accuracy=max(up, 1.0 - up),
        ece=expected_calibration_error(score, label),
        pairwise_accuracy=pairwise_accuracy(score, pairs) if pairs else None,
    )


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Scores, Labels]:
    """Scores and labels as arrays; ValueError if they are unusable."""
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if score.ndim != 1 or score.shape != label.shape or not len(score):
        raise ValueError(f"scores and labels must be two lists of one length, not {score.shape} and {label.shape}")
    if not np.isfinite(score).all():
        raise ValueError(f"{(~np.isfinite(score)).sum()} of {len(score)} scores are not finite")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 (down) or 1 (up)")
    return score, label.astype(np.int64)


def auroc(scores: Scores, labels: Labels) -> float | None:
    """How often an up scores above a down, ties half; None where all labels are alike."""
    return None if _is_one_class(labels) else float(roc_auc_score(labels, scores))


def accuracy(scores: Scores, labels: Labels) -> float:
    """Share of answers on the right side of 0."""
    return float(accuracy_score(labels, scores > 0))


def balanced_accuracy(scores: Scores, labels: Labels) -> float:
    """Mean of the accuracy on ups and on downs; where all labels are alike, the accuracy on those."""
    if _is_one_class(labels):  # scikit-learn's answer as well, but with a warning
        return accuracy(scores, labels)
    return float(balanced_accuracy_score(labels, scores > 0))


def _is_one_class(labels: Labels) -> bool:
    return bool(labels.min() == labels.max())


def pairwise_accuracy(scores: Scores, pairs: Sequence[tuple[int, int]]) -> float:
    """Share of pairs whose better answer scores higher, ties half."""
    better, worse = np.asarray(pairs, dtype=np.int64).T
    difference = scores[better] - scores[worse]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def expected_calibration_error(scores: Scores, labels: Labels) -> float:
    """Mean distance between the probability given and the share of ups, over bins: Σ n_b/n |p̄_b - ȳ_b|.

    The ten bins hold equal numbers of answers (equal mass), not equal stretches of probability: a reward
    model's probabilities crowd together, and most equal stretches would be empty (Nguyen & O'Connor 2015;
    Roelofs et al. 2022 find this form less biased). Equal scores share a bin, so that the order of the
    answers does not matter. The fewer the answers, the more the estimate lies above the truth.
    """
    # n_b |p̄_b - ȳ_b| is the absolute sum of the differences in the bin.
    gaps = np.bincount(_bins(scores), weights=_probabilities(scores) - labels, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def reliability(scores: ArrayLike, labels: ArrayLike) -> list[dict[str, float]]:
    """What was promised and what came, by bins as in `expected_calibration_error`.

    Returns:
        for each bin: the mean `probability` given, the `share` of ups, and `n`, the answers.
    """
    score, label = _checked(scores, labels)
    bins, given = _bins(score), _probabilities(score)
    return [
        {
            "probability": float(given[bins == one].mean()),
            "share": float(label[bins == one].mean()),
            "n": int((bins == one).sum()),
        }
        for one in np.unique(bins)
    ]


def score_histogram(scores: ArrayLike, labels: ArrayLike, bins: int = 24) -> dict[str, list[float]]:
    """How often each stretch of scores came up: `edges` (bins + 1), and the counts of `up` and `down`."""
    score, label = _checked(scores, labels)
    edges = np.histogram_bin_edges(score, bins)
    up, down = (np.histogram(score[label == one], edges)[0] for one in (1, 0))
    return {"edges": edges.tolist(), "up": up.tolist(), "down": down.tolist()}


def _probabilities(scores: Scores) -> Scores:
    return np.asarray(0.5 * (1.0 + np.tanh(scores / 2)))  # the sigmoid, without overflow


def _bins(scores: Scores) -> NDArray[np.int64]:
    """Equal-mass bins; equal scores share one."""
    rank = np.searchsorted(np.sort(scores), scores, side="left")
    return np.asarray(rank * ECE_BINS // len(scores))


def grouped_interval(
    metric: Metric,
    scores: ArrayLike,
    labels: ArrayLike,
    groups: Sequence[str] | Sequence[int],
    seed: int,
    samples: int = 200,
) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a metric, whole dialogues resampled (Field & Welsh 2007).

    The answers of one dialogue resemble one another; drawing them one by one would give an interval that is
    too narrow. The interval runs between the 2.5 and 97.5 percentiles of the resamples.

    Args:
        metric: of scores and labels, such as `auroc`; resamples where it is None are left out.
        scores: log-odds, one an answer.
        labels: 1 or True for up, 0 or False for down.
        groups: the dialogue of each answer.
        seed: of the resampling.
        samples: how many resamples.

    Returns:
        lower and upper end, or None if the metric was None in every resample.
    """
    score, label = _checked(scores, labels)
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        drawn = generator.integers(len(members), size=len(members))
        rows = np.concatenate([members[group] for group in drawn])
        value = metric(score[rows], label[rows])
        if value is not None and math.isfinite(value):
            values.append(value)
    if not values:
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
