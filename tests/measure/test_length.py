"""A scorer that depends on length alone is detected, whatever its function of length; one that reads is not."""

import numpy as np
import pytest

from perl.measure.bootstrap import ClusterBootstrap, Floats, value_of
from perl.measure.length import length_bias, length_bias_of_pairs, spearman
from perl.measure.metrics import Labels, auroc


def liked_for_length(count: int = 2000) -> tuple[Floats, Floats, Labels]:
    """Return lengths and qualities of answers, and labels that prefer longer and better ones."""
    random = np.random.default_rng(0)
    lengths, quality = random.integers(10, 200, size=count).astype(np.float64), random.normal(size=count)
    return lengths, quality, (lengths / 50 + quality + random.normal(size=count) > 1.5).astype(np.int64)


def test_spearman_by_hand() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: deviations (-1.5, 0, 0, 1.5) and (-.5, -1.5, .5, 1.5).
    expected = (0.75 + 2.25) / np.sqrt(4.5 * 5.0)
    assert spearman(np.array([1.0, 5.0, 5.0, 9.0]), np.array([20.0, 1.0, 30.0, 400.0])) == pytest.approx(expected)
    assert spearman(np.ones(4), np.arange(4.0)) is None


@pytest.mark.parametrize(
    "count",
    [
        lambda lengths, noise: lengths,
        lambda lengths, noise: np.log(lengths),
        lambda lengths, noise: lengths / 50 + 0.3 * noise,
    ],
    ids=["count", "bent", "noisy"],
)
def test_counting_is_no_ranking_among_like_lengths(count: object) -> None:
    lengths, _, labels = liked_for_length()
    scores = count(lengths, np.random.default_rng(1).normal(size=len(lengths)))  # type: ignore[operator]
    bias = length_bias(scores, lengths, labels, ClusterBootstrap(range(len(labels)), seed=0))
    assert bias.correlation > 0.9
    ranked = value_of(auroc(scores, labels), len(labels))
    assert ranked is not None
    assert ranked > 0.7
    assert bias.auroc_of_length > 0.7
    assert bias.auroc_within == pytest.approx(0.5, abs=0.05)
    assert bias.ahead <= 1e-9 or bias.ahead_interval[0] < 0
    assert bias.ahead_interval[0] <= 0


def test_short_is_counted_too() -> None:
    lengths, _, labels = liked_for_length()
    bias = length_bias(-lengths, lengths, 1 - labels, ClusterBootstrap(range(len(labels)), seed=0))
    assert bias.correlation == pytest.approx(-1.0)
    assert bias.auroc_of_length < 0.3
    assert bias.ahead_interval == (0.0, 0.0)


def test_reading_is_seen_beside_length() -> None:
    lengths, quality, labels = liked_for_length()
    bias = length_bias(lengths / 50 + quality, lengths, labels, ClusterBootstrap(range(len(labels)), seed=0))
    assert bias.correlation > 0.5
    assert bias.auroc_within > 0.75
    assert bias.ahead_interval[0] > 0.2


def test_pairs_are_compared_among_similar_differences_in_length() -> None:
    """A function of length, even nonlinear or noisy, is right half of the time; a model that reads is better."""
    random = np.random.default_rng(0)
    lengths, quality = random.integers(10, 200, size=(2, 3000)).astype(np.float64), random.normal(size=(2, 3000))
    liked = lengths / 50 + quality + 0.5 * random.normal(size=(2, 3000))
    better = liked.argmax(0)

    def differences(of_both: Floats) -> Floats:
        one, other = of_both[better, range(3000)], of_both[1 - better, range(3000)]
        return np.asarray(one - other)

    bootstrap = ClusterBootstrap(range(3000), seed=0)
    for count in (lengths, np.log(lengths), lengths / 50 + 0.3 * random.normal(size=(2, 3000))):
        bias = length_bias_of_pairs(differences(count), differences(lengths), bootstrap)
        assert bias.auroc_of_length > 0.7
        assert bias.auroc_within == pytest.approx(0.5, abs=0.02)
        assert bias.ahead_interval[0] < 0.005
    reading = length_bias_of_pairs(differences(quality), differences(lengths), bootstrap)
    assert reading.auroc_within > 0.7
    assert reading.ahead == pytest.approx(reading.auroc_within - 0.5)
    assert reading.ahead_interval[0] > 0.15
    # Pairs of equal length count as half longer and half shorter.
    alike = length_bias_of_pairs(differences(quality), np.zeros(3000), bootstrap)
    assert alike.auroc_within == pytest.approx((differences(quality) > 0).mean())
    assert alike.auroc_of_length == 0.5


def test_nothing_to_compare() -> None:
    """Length determines the labels: no two answers of similar length have different ones."""
    lengths, labels = np.repeat([10.0, 20.0], 20), np.repeat([0, 1], 20)
    bias = length_bias(lengths, lengths, labels, ClusterBootstrap(range(40), seed=0))
    assert bias.auroc_within is None
    assert bias.ahead_interval is None
