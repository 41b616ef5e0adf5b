"""The metrics of a reward model against values worked by hand and against scikit-learn's."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from perl.measure.bootstrap import Floats, Statistic, value_of
from perl.measure.metrics import (
    ReliabilityBin,
    accuracy,
    auroc,
    balanced_accuracy,
    calibration_error,
    checked,
    equal_mass,
    pairwise_accuracy,
    reliability,
    score_histogram,
)

# Ups score 2, 1, -1 and -3; downs -2 and 0.
SCORES = np.array([2.0, 1.0, -1.0, -3.0, -2.0, 0.0])
LABELS = np.array([1, 1, 1, 1, 0, 0])


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def of_all(statistic: Statistic, answers: int = 6) -> float | None:
    return value_of(statistic, answers)


def test_by_hand() -> None:
    # Ups above downs: 2 and 1 beat both (4), -1 beats -2 (1), -3 none: 5 of 8.
    assert of_all(auroc(SCORES, LABELS)) == pytest.approx(5 / 8)
    # Right: 2 and 1 of the ups; -2 and 0 (not above 0) of the downs: 4 of 6, recalls 2/4 and 2/2.
    assert of_all(accuracy(SCORES, LABELS)) == pytest.approx(4 / 6)
    assert of_all(balanced_accuracy(SCORES, LABELS)) == pytest.approx((2 / 4 + 2 / 2) / 2)
    # (2 > -2) right, (-3 < -2) wrong, (-1 < 0) wrong, (1 = 1) half
    assert of_all(pairwise_accuracy(SCORES, [(0, 4), (3, 4), (2, 5), (1, 1)])) == pytest.approx(1.5 / 4)
    # six answers in ten bins stand alone: the mean of |p - y|
    distances = [abs(1 / (1 + math.exp(-score)) - label) for score, label in zip(SCORES, LABELS, strict=True)]
    assert calibration_error(SCORES, LABELS) == pytest.approx(sum(distances) / 6)


def test_within_strata_by_hand() -> None:
    # Strata {2, 1, 0 down}, {-1, -3, -2 down}: the first has 2 and 1 above 0, the second only -1 above -2: 3 of 4.
    strata = np.array([0, 0, 1, 1, 1, 0])
    assert of_all(auroc(SCORES, LABELS, strata)) == pytest.approx(3 / 4)
    # A stratum without downs compares nothing.
    assert of_all(auroc(SCORES, LABELS, np.array([0, 2, 1, 1, 1, 0]))) == pytest.approx(2 / 3)
    assert of_all(auroc(SCORES, LABELS, np.arange(6))) is None


def test_ties_count_half() -> None:
    assert of_all(auroc(np.zeros(6), LABELS)) == 0.5
    # The ups 1 and 0, the down 0: one win and one tie.
    assert of_all(auroc(np.array([1.0, 0.0, 0.0]), np.array([1, 1, 0])), 3) == pytest.approx(1.5 / 2)


def test_one_class() -> None:
    scores, labels = np.array([1.0, 2.0, -1.0]), np.array([1, 1, 1])
    assert of_all(auroc(scores, labels), 3) is None
    assert of_all(balanced_accuracy(scores, labels), 3) == pytest.approx(2 / 3)
    assert of_all(balanced_accuracy(scores, 1 - labels), 3) == pytest.approx(1 / 3)


def copied(statistic_of: object, times: np.ndarray) -> float | None:
    """Return the statistic of the answers with each copied `times` times."""
    places = np.repeat(np.arange(len(times)), times)
    return value_of(statistic_of(places), len(places))  # type: ignore[operator]


def test_weights_count_like_copies() -> None:
    """Every statistic with weights equals that with copied answers, and scikit-learn's."""
    random = np.random.default_rng(0)
    scores = random.integers(-6, 7, size=80) / 3
    labels = random.integers(0, 2, size=80)
    strata = random.integers(0, 3, size=80)
    times_SN = random.integers(0, 4, size=(5, 80))
    metrics = {
        "auroc": (auroc(scores, labels), lambda rows: auroc(scores[rows], labels[rows])),
        "within": (auroc(scores, labels, strata), lambda rows: auroc(scores[rows], labels[rows], strata[rows])),
        "accuracy": (accuracy(scores, labels), lambda rows: accuracy(scores[rows], labels[rows])),
        "balanced": (
            balanced_accuracy(scores, labels),
            lambda rows: balanced_accuracy(scores[rows], labels[rows]),
        ),
    }
    for name, (statistic, of_rows) in metrics.items():
        expected = [copied(of_rows, times) for times in times_SN]
        assert statistic(times_SN.astype(np.float64)).tolist() == pytest.approx(expected), name
    weighted = auroc(scores, labels)(times_SN.astype(np.float64))
    theirs = [roc_auc_score(labels, scores, sample_weight=times) for times in times_SN]
    assert weighted.tolist() == pytest.approx(theirs)
    assert value_of(balanced_accuracy(scores, labels), 80) == pytest.approx(
        balanced_accuracy_score(labels, scores > 0)
    )


def test_ece_of_equal_mass_bins() -> None:
    # Twenty answers, two a bin. Bin b gives p = 0.05 + 0.1 b (twice); its share of ups is 0 below p = ½, and
    # 1 above: |gaps| 0.05, 0.15, .., 0.45 and the same again, mean 0.25.
    scores = np.array([log_odds(0.05 + 0.1 * b) for b in range(10) for _ in range(2)])
    labels = np.array([int(b >= 5) for b in range(10) for _ in range(2)])
    assert calibration_error(scores, labels) == pytest.approx(0.25)
    # One up of two in every bin: |p - ½| is 0.45, 0.35, .., 0.05 and back, mean 0.25 again; the labels of
    # a bin are averaged before the distance is taken (answer by answer the mean would be ½).
    assert calibration_error(scores, np.array([0, 1] * 10)) == pytest.approx(0.25)


def test_ece_bins_hold_equal_numbers() -> None:
    # Eighteen answers crowd between p = 0.50 and 0.517 and two sit at 0.99. Bins of equal width would join
    # the eighteen, with a gap of |0.5085 - 0.5|; two a bin, each is all up or all down.
    probabilities = [0.5 + 0.001 * i for i in range(18)] + [0.99, 0.991]
    labels = np.array([i // 2 % 2 for i in range(18)] + [1, 1])
    scores = np.array([log_odds(p) for p in probabilities])
    expected = sum(abs(p - y) for p, y in zip(probabilities, labels, strict=True)) / 20
    assert calibration_error(scores, labels) == pytest.approx(expected)


def test_ece_of_a_constant_score_does_not_depend_on_the_order() -> None:
    # p = ½ for all, 3 of 12 up: |½ - ¼|, whichever stand first.
    for labels in ([1] * 3 + [0] * 9, [0] * 9 + [1] * 3, [1, 0, 0, 0] * 3):
        assert calibration_error(np.zeros(12), np.array(labels)) == pytest.approx(0.25)


def test_extreme_scores_do_not_overflow() -> None:
    assert calibration_error(np.array([1e4, -1e4]), np.array([1, 0])) == 0.0
    assert calibration_error(np.array([1e4, -1e4]), np.array([0, 1])) == 1.0


def test_bins_and_counts() -> None:
    assert equal_mass(np.array([5.0, 1.0, 1.0, 9.0]), 2).tolist() == [1, 0, 0, 1]
    assert equal_mass(np.array([1.0, 1.0, 1.0, 9.0]), 2).tolist() == [0, 0, 0, 1]
    assert reliability(np.zeros(4), np.array([1, 0, 0, 0])) == [ReliabilityBin(probability=0.5, share=0.25, n=4)]
    counts = score_histogram(SCORES, LABELS, bins=5)
    assert counts.edges == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]
    assert (counts.up, counts.down) == ([1, 0, 1, 0, 2], [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "one length"),
        ([1.0, 2.0], [1], "one length"),
        ([1.0, math.nan], [1, 0], "1 of 2 scores are not finite"),
        ([1.0, 2.0], [1, 2], "labels must be"),
    ],
)
def test_unusable_input_is_refused(scores: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(scores, labels)


def test_single_precision_is_taken() -> None:
    scores, labels = checked(SCORES.astype(np.float32), [True, True, True, True, False, False])
    found: Floats = auroc(scores, labels)(np.ones((1, 6)))
    assert found.tolist() == [5 / 8]
