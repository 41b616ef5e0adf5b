"""Matched KL against numbers worked by hand."""

import numpy as np
import pytest

from perl.report.outcome import at_kl, curve, match, smooth, window
from perl.report.runs import Series


def _metrics(kl: list[float], reward: list[float], **more: list[float]) -> dict[str, Series]:
    return {name: np.array(values) for name, values in {"kl": kl, "reward": reward, **more}.items()}


def test_smooth() -> None:
    """Means are over three values, over two at the ends, and over those that exist."""
    assert smooth(np.array([0.0, 3.0, 6.0, 0.0])).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert smooth(np.array([1.0, np.nan, 3.0])).tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(smooth(np.array([np.nan, np.nan, np.nan, 1.0]))).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("steps", "wide"), [(5, 3), (55, 5), (80, 9), (100, 11)])
def test_window(steps: int, wide: int) -> None:
    """The window is a tenth of the steps, odd, and at least three."""
    assert window(steps) == wide


def test_at_kl() -> None:
    """Interpolated between two steps where the KL first reaches the value; steps without a value do not count."""
    kl, values = np.array([0.0, 2.0, 1.0, 4.0]), np.array([10.0, 20.0, 0.0, 40.0])
    assert at_kl(kl, values, 1.0) == 15.0
    assert at_kl(kl, values, 3.0) == pytest.approx(40 * 2 / 3)
    assert at_kl(kl, values, -1.0) == 10.0
    assert at_kl(kl, values, 4.1) is None
    assert at_kl(kl, np.array([10.0, np.nan, 0.0, 40.0]), 1.0) == 0.0


def test_match() -> None:
    """After smoothing, the first run has KL .5 1 2 3 3.5 and reward 1 2 4 6 7, the second KL .25 .5 1 1.5 1.75.

    All reach 1.75, the first three quarters of the way from its second step to its third.
    """
    first = curve(_metrics([0, 1, 2, 3, 4], [0, 2, 4, 6, 8]))
    second = curve(_metrics([0, 0.5, 1, 1.5, 2], [0, 1, 2, 3, 4], gold=[0, 0, 0, 1, 1]))
    found = match([first, second])
    assert found is not None
    assert found.kl == 1.75
    assert found.rewards == (3.5, 3.5)
    assert found.golds == (None, 1.0)


def test_too_short() -> None:
    """Nothing is matched with fewer than five steps that have both metrics."""
    nan = float("nan")
    long, short = curve(_metrics([0, 1, 2, 3, 4], [0] * 5)), curve(_metrics([0, 1, 2, nan, 4], [0] * 5))
    assert long is not None
    assert short is None
    assert curve({}) is None
    assert match([long, short]) is None
    assert match([]) is None
