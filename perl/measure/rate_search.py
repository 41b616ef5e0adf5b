"""Search for the best learning rate: a geometric grid that is extended, and the vertex of a parabola.

Rates c · √10^k are tried, starting with k = -1, 0, 1; while the best is the smallest or largest rate tried, the
next one beyond it is tried, too. The best rate is the vertex of the parabola through the best and its two
neighbours over the logarithm of the rate (one step of successive parabolic interpolation, Brent 1973). It is known
to half a step of the grid, a factor of 1.8, if the three scores differ by more than chance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

STEP = math.sqrt(10)
MOST = 5
"""Largest number of steps on either side of the default."""
LARGEST = 1.0
"""Largest learning rate that a recipe accepts."""


@dataclass(frozen=True)
class BestRates:
    """The best rates of one setting on several seeds.

    Attributes:
        rates: the best rate of each seed.
        edge: whether on at least one seed the best is the smallest or largest tried, so that it may lie beyond.
    """

    rates: tuple[float, ...]
    edge: bool

    @property
    def best(self) -> float:
        """Geometric mean, to two significant digits."""
        return grid_rate(math.exp(sum(map(math.log, self.rates)) / len(self.rates)), 0)


def search_rate(score: Callable[[float], float], default: float) -> tuple[float, bool]:
    """Search around a default; among equal scores the rate nearest to it wins.

    Args:
        score: returns the score of a rate; higher is better, -inf means that training failed.

    Returns:
        the best rate, which may lie between tried rates, and whether the best of these is the smallest or largest.
    """
    tried: dict[int, float] = {}
    waiting = [-1, 0, 1]
    while waiting:
        for k in waiting:
            if grid_rate(default, k) <= LARGEST:
                tried[k] = score(grid_rate(default, k))
        best = max(tried, key=lambda k: (tried[k], -abs(k)))
        waiting = [
            k
            for k in (best - 1, best + 1)
            if k not in tried and abs(k) <= MOST and grid_rate(default, k) <= LARGEST
        ]
    edge = best in (min(tried), max(tried))
    top = best + (0.0 if edge else _top(tried[best - 1], tried[best], tried[best + 1]))
    return grid_rate(default, top), edge


def grid_rate(default: float, k: float) -> float:
    """Return the rate k steps from the default, to two significant digits, as written in a recipe."""
    return float(f"{default * STEP**k:.2g}")


def _top(left: float, middle: float, right: float) -> float:
    """Return the vertex of the parabola through (-1, left), (0, middle), (1, right); middle is the highest."""
    curvature = left - 2 * middle + right
    return 0.5 * (left - right) / curvature if math.isfinite(curvature) and curvature < 0 else 0.0
