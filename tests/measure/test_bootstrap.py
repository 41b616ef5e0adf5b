"""Intervals by dialogue."""

import numpy as np
import pytest

from perl.measure import bootstrap
from perl.measure.bootstrap import ClusterBootstrap, Estimate, Floats
from perl.measure.metrics import accuracy, auroc, balanced_accuracy


def test_whole_dialogues_are_drawn() -> None:
    # Two dialogues, one all right and one all wrong: a resample draws RR, RW, WR or WW, so accuracies are
    # 1, ½, ½ or 0, each end a quarter of the time, and the interval is all of [0, 1]. Resampling the
    # 200 answers one by one gives ½ ± 0.07.
    right = accuracy(np.ones(200), np.repeat([1, 0], 100))
    of_two = ClusterBootstrap(["right"] * 100 + ["wrong"] * 100, seed=0).estimate(right)
    assert of_two == Estimate(0.5, (0.0, 1.0))
    alone = ClusterBootstrap(range(200), seed=0).estimate(right)
    assert alone.interval == pytest.approx((0.43, 0.57), abs=0.02)


def test_dialogues_keep_their_sizes() -> None:
    # One dialogue of 9 answers and one of 1: resamples hold 18, 10 or 2.
    seen: set[float] = set()

    def note(weights_SN: Floats) -> Floats:
        seen.update(weights_SN.sum(axis=1).tolist())
        return np.zeros(len(weights_SN))

    assert ClusterBootstrap([5] * 9 + [2], seed=0).estimate(note) == Estimate(0.0, (0.0, 0.0))
    assert seen == {18.0, 10.0, 2.0}


def test_the_seed_decides_and_what_has_no_value_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    scores = labels + random.normal(size=40)
    groups = [i // 4 for i in range(40)]
    ranked = auroc(scores, labels)
    first = ClusterBootstrap(groups, seed=1).estimate(ranked)
    assert first.value is not None
    assert first.interval is not None
    assert first.interval[0] < first.value < first.interval[1]
    assert ClusterBootstrap(groups, seed=2).estimate(ranked) != first
    monkeypatch.setattr(bootstrap, "CHUNK", 100)  # two resamples in memory at a time
    assert ClusterBootstrap(groups, seed=1).estimate(ranked) == first
    # Dialogues of one class each: some resamples have one class only, without an AUROC.
    mixed = ClusterBootstrap(["a", "b"], seed=0).estimate(auroc(np.array([1.0, -1.0]), np.array([1, 0])))
    assert mixed == Estimate(1.0, (1.0, 1.0))
    ups = np.array([1.0, 2.0]), np.array([1, 1])
    assert ClusterBootstrap(["a", "b"], seed=0).estimate(auroc(*ups)) == Estimate(None, None)
    assert ClusterBootstrap(["a", "b"], seed=0).estimate(balanced_accuracy(*ups)) == Estimate(1.0, (1.0, 1.0))


def test_differences_are_paired() -> None:
    """Two noisy metrics with the same difference in every resample have an interval of width 0."""
    random = np.random.default_rng(0)
    values = random.normal(size=50)
    resampled = ClusterBootstrap(range(50), seed=0)

    def mean(weights_SN: Floats) -> Floats:
        return weights_SN @ values / weights_SN.sum(axis=1)

    alone = resampled.estimate(mean).interval
    assert alone is not None
    assert alone[1] - alone[0] > 0.3
    difference = resampled.estimate(lambda weights_SN: mean(weights_SN) + 0.1 - mean(weights_SN))
    assert difference.interval == pytest.approx((0.1, 0.1))
