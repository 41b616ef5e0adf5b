"""The reward model's report card against figures worked by hand."""

import json
import math

import numpy as np
import pytest

from perl.measure.metrics import (
    accuracy,
    auroc,
    balanced_accuracy,
    expected_calibration_error,
    grouped_interval,
    reward_metrics,
)

# Ups score 2, 1, -1 and -3; downs -2 and 0.
SCORES = [2.0, 1.0, -1.0, -3.0, -2.0, 0.0]
LABELS = [1, 1, 1, 1, 0, 0]


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_by_hand() -> None:
    # Ups above downs: 2 and 1 beat both (4), -1 beats -2 (1), -3 none: 5 of 8.
    # Right: 2 and 1 of the ups; -2 and 0 (not above 0) of the downs: 4 of 6, recalls 2/4 and 2/2.
    metrics = reward_metrics(SCORES, LABELS, pairs=[(0, 4), (3, 4), (2, 5), (1, 1)])
    assert metrics.n == 6
    assert metrics.auroc == pytest.approx(5 / 8)
    assert metrics.accuracy == pytest.approx(4 / 6)
    assert metrics.balanced_accuracy == pytest.approx((2 / 4 + 2 / 2) / 2)
    assert metrics.majority_accuracy == pytest.approx(4 / 6)
    # (2 > -2) right, (-3 < -2) wrong, (-1 < 0) wrong, (1 = 1) half
    assert metrics.pairwise_accuracy == pytest.approx(1.5 / 4)
    # six answers in ten bins stand alone: the mean of |p - y|
    probabilities = [1 / (1 + math.exp(-score)) for score in SCORES]
    distances = [abs(p - y) for p, y in zip(probabilities, LABELS, strict=True)]
    assert metrics.ece == pytest.approx(sum(distances) / 6)


def test_majority_of_downs() -> None:
    assert reward_metrics([1.0, -1.0, -1.0, -2.0], [1, 0, 0, 0]).majority_accuracy == pytest.approx(3 / 4)


def test_one_class_has_no_auroc() -> None:
    metrics = reward_metrics([1.0, 2.0, -1.0], [True, True, True])
    assert metrics.auroc is None
    assert metrics.balanced_accuracy == metrics.accuracy == pytest.approx(2 / 3)
    assert metrics.majority_accuracy == 1.0


def test_json() -> None:
    plain = reward_metrics(np.asarray(SCORES, dtype=np.float32), np.asarray(LABELS)).as_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain) == ["n", "auroc", "balanced_accuracy", "accuracy", "majority_accuracy", "ece"]
    assert "pairwise_accuracy" in reward_metrics(SCORES, LABELS, pairs=[(0, 4)]).as_json()


def test_ece_of_equal_mass_bins() -> None:
    # Twenty answers, two a bin. Bin b gives p = 0.05 + 0.1 b (twice); its share of ups is 0 below p = ½, and
    # 1 above: |gaps| 0.05, 0.15, .., 0.45 and the same again, mean 0.25.
    scores = [log_odds(0.05 + 0.1 * b) for b in range(10) for _ in range(2)]
    labels = [int(b >= 5) for b in range(10) for _ in range(2)]
    assert expected_calibration_error(np.array(scores), np.array(labels)) == pytest.approx(0.25)
    # One up of two in every bin: |p - ½| is 0.45, 0.35, .., 0.05 and back, mean 0.25 again; the labels of
    # a bin are averaged before the distance is taken (answer by answer the mean would be ½).
    assert expected_calibration_error(np.array(scores), np.array([0, 1] * 10)) == pytest.approx(0.25)


def test_ece_bins_hold_equal_numbers() -> None:
    # Eighteen answers crowd between p = 0.50 and 0.517 and two sit at 0.99. Bins of equal width would join
    # the eighteen, with a gap of |0.5085 - 0.5|; two a bin, each is all up or all down.
    probabilities = [0.5 + 0.001 * i for i in range(18)] + [0.99, 0.991]
    labels = np.array([i // 2 % 2 for i in range(18)] + [1, 1])
    scores = np.array([log_odds(p) for p in probabilities])
    expected = sum(abs(p - y) for p, y in zip(probabilities, labels, strict=True)) / 20
    assert expected_calibration_error(scores, labels) == pytest.approx(expected)


def test_ece_of_a_constant_score_does_not_depend_on_the_order() -> None:
    # p = ½ for all, 3 of 12 up: |½ - ¼|, whichever stand first.
    for labels in ([1] * 3 + [0] * 9, [0] * 9 + [1] * 3, [1, 0, 0, 0] * 3):
        assert expected_calibration_error(np.zeros(12), np.array(labels)) == pytest.approx(0.25)


def test_extreme_scores_do_not_overflow() -> None:
    assert reward_metrics([1e4, -1e4], [1, 0]).ece == 0.0
    assert reward_metrics([1e4, -1e4], [0, 1]).ece == 1.0


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
        reward_metrics(scores, labels)


def test_interval_of_whole_groups() -> None:
    # Two dialogues, one all right and one all wrong: a resample draws RR, RW, WR or WW, so accuracies are
    # 1, ½, ½ or 0, each end a quarter of the time, and the interval is all of [0, 1]. Resampling the
    # 200 answers one by one gives ½ ± 0.07.
    scores, labels = np.ones(200), np.repeat([1, 0], 100)
    groups = ["right"] * 100 + ["wrong"] * 100
    assert grouped_interval(accuracy, scores, labels, groups, seed=0) == (0.0, 1.0)
    alone = grouped_interval(accuracy, scores, labels, range(200), seed=0)
    assert alone is not None
    assert alone == pytest.approx((0.43, 0.57), abs=0.03)


def test_groups_keep_their_sizes() -> None:
    # One dialogue of 9 right answers and one of 1 wrong: accuracies 1, 9/10 or 0, never ½.
    seen = set()

    def note(scores: np.ndarray, labels: np.ndarray) -> float:
        seen.add(round(accuracy(scores, labels), 6))
        return 0.0

    assert grouped_interval(note, np.ones(10), [1] * 9 + [0], [5] * 9 + [2], seed=0) == (0.0, 0.0)
    assert seen == {0.0, 0.9, 1.0}


def test_interval_repeats_with_the_seed_and_leaves_out_what_has_no_value() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 2
    scores = labels + generator.normal(size=40)
    groups = [i // 4 for i in range(40)]
    first = grouped_interval(auroc, scores, labels, groups, seed=1)
    assert first is not None
    point = auroc(scores, labels)
    assert point is not None
    assert first[0] < point < first[1]
    assert grouped_interval(auroc, scores, labels, groups, seed=1) == first
    assert grouped_interval(auroc, scores, labels, groups, seed=2) != first
    # Groups of one class each: some resamples have one class only, without an AUROC.
    mixed = grouped_interval(auroc, [1.0, -1.0], [1, 0], ["a", "b"], seed=0)
    assert mixed == (1.0, 1.0)
    assert grouped_interval(auroc, [1.0, 2.0], [1, 1], ["a", "b"], seed=0) is None
    assert grouped_interval(balanced_accuracy, [1.0, 2.0], [1, 1], ["a", "b"], seed=0) == (1.0, 1.0)
