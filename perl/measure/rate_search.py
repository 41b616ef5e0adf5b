"""The best learning rate of a training: a geometric grid that is widened, and the top of a parabola.

Rates c · √10^k are tried, from k = -1, 0, 1 on; while the best is the smallest or the largest that was tried, the
next one beyond it is tried too. The parabola through the best and its two neighbours, over the rate's logarithm,
has its top between them (one step of successive parabolic interpolation, Brent 1973): that is the best rate. It is
known to half a step of the grid, a factor of 1.8, where the three scores differ by more than chance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

STEP = math.sqrt(10)
MOST = 5
"""Steps to either side of the default."""
LARGEST = 1.0
"""That a recipe takes."""


@dataclass(frozen=True)
class RateSearch:
    """What was tried, and what was found.

    Attributes:
        rates: in order.
        scores: of each rate; more is better, and -inf is a training that failed.
        best: between the rates that were tried.
        edge: nothing beyond the best was tried, on one side: the true one may lie there.
    """

    rates: tuple[float, ...]
    scores: tuple[float, ...]
    best: float
    edge: bool


@dataclass(frozen=True)
class BestRates:
    """The best rates of one setting on several seeds.

    Attributes:
        rates: of each seed.
        edge: on one seed at least, the best is the smallest or the largest that was tried: it may lie beyond.
    """

    rates: tuple[float, ...]
    edge: bool

    @property
    def best(self) -> float:
        """The geometric mean, to two significant digits."""
        return grid_rate(math.exp(sum(map(math.log, self.rates)) / len(self.rates)), 0)


def search_rate(score: Callable[[float], float], default: float) -> RateSearch:
    """Search around a default; of equal scores the rate nearest to it counts."""
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
    points = sorted(tried)
    rates, scores = (grid_rate(default, k) for k in points), (tried[k] for k in points)
    edge = best in (points[0], points[-1])
    top = best + (0.0 if edge else _top(tried[best - 1], tried[best], tried[best + 1]))
    return RateSearch(tuple(rates), tuple(scores), grid_rate(default, top), edge)


def grid_rate(default: float, k: float) -> float:
    """The default, k steps on, to two significant digits: as it stands in a recipe."""
    return float(f"{default * STEP**k:.2g}")


def _top(left: float, middle: float, right: float) -> float:
    """Where the parabola through (-1, left), (0, middle), (1, right) has its top, middle being the highest."""
    curvature = left - 2 * middle + right
    return 0.5 * (left - right) / curvature if math.isfinite(curvature) and curvature < 0 else 0.0
