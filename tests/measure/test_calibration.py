"""Scaling: the fit, the error after it, and no answer evaluated with a fit on its own dialogue."""

import math

import numpy as np
import pytest

from perl.data.records import Turn
from perl.measure.bootstrap import Floats
from perl.measure.calibration import calibrate, cross_fitted, ece_by_chance, fit, predictions
from perl.measure.metrics import Labels, calibration_error, probabilities
from perl.measure.rated_rows import RatedRows


def drawn(count: int, slope: float, intercept: float, seed: int = 0) -> tuple[Floats, Labels]:
    """Return scores whose true log-odds are slope · score + intercept."""
    random = np.random.default_rng(seed)
    scores = 2 * random.normal(size=count)
    return scores, (random.random(count) < probabilities(slope * scores + intercept)).astype(np.int64)


def test_fit_by_hand() -> None:
    # At score -1 one of four is up, at 1 three of four. With Platt's targets t₊ = 5/6 and t₋ = 1/6 the means
    # there are (5/6 + 3/6) / 4 = 1/3 and 2/3: log-odds -log 2 and log 2, so the slope is log 2.
    scores, labels = np.repeat([-1.0, 1.0], 4), np.array([1, 0, 0, 0, 0, 1, 1, 1])
    found = fit(scores, labels)
    assert found.slope == pytest.approx(math.log(2), rel=1e-5)
    assert found.intercept == pytest.approx(0.0, abs=1e-6)
    # In other units, from another zero, the same probabilities.
    moved = fit(1e4 * scores + 3e4, labels)
    assert moved.slope == pytest.approx(math.log(2) / 1e4, rel=1e-5)
    assert moved.intercept == pytest.approx(-3 * math.log(2), rel=1e-5)


def test_fit_of_a_constant_is_the_share() -> None:
    # 3 of 4 up: targets 4/5 and 1/3 give a mean of (3 · 4/5 + 1/3) / 4 = 0.68333.
    found = fit(np.full(4, 7.0), np.array([1, 1, 1, 0]))
    share = (3 * 4 / 5 + 1 / 3) / 4
    assert probabilities(found(np.array([7.0])))[0] == pytest.approx(share, rel=1e-6)


def test_the_true_scaling_is_found() -> None:
    scores, labels = drawn(20_000, slope=0.5, intercept=1.5)
    found = fit(scores, labels)
    assert found.slope == pytest.approx(0.5, abs=0.02)
    assert found.intercept == pytest.approx(1.5, abs=0.05)
    scores, labels = drawn(20_000, slope=0.5, intercept=0.0)
    assert fit(scores, labels, intercept=False).slope == pytest.approx(0.5, abs=0.02)


def test_separable_scores_have_a_finite_slope() -> None:
    found = fit(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert 0 < found.slope < 10


def answers(labels: Labels, dialogues: list[str], pairs: list[tuple[int, int]] | None = None) -> RatedRows:
    count = len(labels)
    return RatedRows(
        contexts=[(Turn("user", "hi"),)] * count,
        answers=[Turn("agent", "hello")] * count,
        dialogues=dialogues,
        sources=["shop"] * count,
        labels=labels.astype(bool).tolist(),
        gold=None,
        pairs=pairs or [],
    )


def test_balanced_weights_and_overconfidence_are_mended() -> None:
    """Scores are twice too confident and centred as for balanced labels: only slope and intercept correct both."""
    scores, labels = drawn(4000, slope=0.5, intercept=1.7)
    calibration, after = calibrate(predictions(scores, answers(labels, [str(n // 4) for n in range(4000)])))
    assert calibration.ece_before > 0.2
    assert calibration.ece_temperature > 0.2
    assert calibration.ece_after < 0.03
    assert calibration.ece_after < calibration.ece_by_chance < 0.04
    assert after is not None
    assert calibration_error(after, labels) == calibration.ece_after
    assert sum(one.n for one in calibration.reliability_after) == 4000


def test_nothing_leaks_from_the_dialogue_judged() -> None:
    """Each of five dialogues has its own scores and share of ups, which are not informative about the others.

    A fit on all five follows them; a fit on the other four differs and shows the error on a new dialogue.
    """
    shares = [0.5, 0.9, 0.1, 0.9, 0.5]
    scores = np.repeat([-2.0, -1.0, 0.0, 1.0, 2.0], 40)
    labels = np.concatenate([np.arange(40) < 40 * share for share in shares]).astype(np.int64)
    dialogues = [str(n // 40) for n in range(200)]
    honest = cross_fitted(scores, labels, dialogues)
    assert honest is not None
    at_once = calibration_error(fit(scores, labels)(scores), labels)
    apart = calibration_error(honest, labels)
    assert apart > at_once + 0.1
    for number in range(5):  # whatever a dialogue's labels are, its own probabilities stay
        own = np.array(dialogues) == str(number)
        again = cross_fitted(scores, np.where(own, 1 - labels, labels), dialogues)
        assert again is not None
        assert np.array_equal(again[own], honest[own])
        assert not np.array_equal(again[~own], honest[~own])


def test_one_dialogue_cannot_be_judged() -> None:
    scores, labels = drawn(40, 1.0, 0.0)
    calibration, after = calibrate(predictions(scores, answers(labels, ["only"] * 40)))
    assert after is None
    assert calibration.ece_after is calibration.ece_temperature is calibration.ece_by_chance is None
    assert calibration.slope > 0


def test_chance_shrinks_with_answers() -> None:
    scores, _ = drawn(8000, 1.0, 0.0)
    few, many = ece_by_chance(scores[:200], seed=0), ece_by_chance(scores, seed=0)
    assert 0.05 < few < 0.2
    assert many < few / 3
    # 95 of 100 label sets that agree with the probabilities stay below.
    random = np.random.default_rng(5)
    labels = [(random.random(200) < probabilities(scores[:200])).astype(np.int64) for _ in range(200)]
    below = [calibration_error(scores[:200], one) for one in labels]
    assert np.mean(np.array(below) < few) == pytest.approx(0.95, abs=0.04)


def test_pairs_are_judged_by_differences() -> None:
    # Pairs (3, 1), (0, 2), (5, 5): differences 2, -2, 0; every other pair turned round: 2, 2, 0.
    scores = np.array([3.0, 0.0, 5.0, 1.0, 2.0, 5.0])
    given = predictions(scores, answers(np.array([1, 1, 1, 0, 0, 0]), list("abcabc"), [(0, 3), (1, 4), (2, 5)]))
    assert given.scores.tolist() == [2.0, 2.0, 0.0]
    assert given.labels.tolist() == [1, 0, 1]
    assert given.dialogues == ["a", "b", "c"]


def test_pairs_have_a_temperature_alone() -> None:
    """Differences are twice too confident: half the slope, no intercept, whatever contexts add to their scores."""
    random = np.random.default_rng(0)
    differences = 2 * random.normal(size=3000)
    first = random.random(3000) < probabilities(0.5 * differences)
    one, other = random.normal(size=3000) + np.array([[differences / 2], [-differences / 2]])
    scores = np.concatenate([np.where(first, one[0], other[0]), np.where(first, other[0], one[0])])
    pairs = [(n, 3000 + n) for n in range(3000)]
    dialogues = [str(n % 3000) for n in range(6000)]
    calibration, _ = calibrate(predictions(scores, answers(np.repeat([1, 0], 3000), dialogues, pairs)))
    assert calibration.of == "the first of two being the better"
    assert (calibration.slope, calibration.intercept) == (pytest.approx(0.5, abs=0.04), 0.0)
    assert calibration.temperature == pytest.approx(2.0, abs=0.2)
    assert calibration.ece_before > 0.08
    assert calibration.ece_after == calibration.ece_temperature < 0.03
