"""The search for a learning rate, on curves whose best rate is known."""

import math

import pytest

from perl.measure.rate_search import BestRates, grid_rate, search_rate


@pytest.mark.parametrize("best", [1e-3, 2e-3, 4e-2, 3e-5])
def test_a_parabola_has_its_top_found_wherever_the_search_begins(best: float) -> None:
    tried: list[float] = []

    def score(rate: float) -> float:
        tried.append(rate)
        return -(math.log(rate / best) ** 2)

    found, edge = search_rate(score, 1e-3)
    assert found == pytest.approx(best, rel=0.06)  # rates have two digits
    assert not edge
    assert len(tried) == len(set(tried)) <= 3 + abs(round(2 * math.log10(best / 1e-3))) + 1


def test_what_only_rises_ends_at_the_edge() -> None:
    assert search_rate(lambda rate: rate, 1e-3) == (grid_rate(1e-3, 5), True)
    largest: list[float] = []
    assert search_rate(lambda rate: largest.append(rate) or rate, 0.5)[1]  # type: ignore[func-returns-value]
    assert max(largest) <= 1  # a recipe takes no higher one


def test_a_training_that_failed_is_never_the_best_nor_bends_the_parabola() -> None:
    assert search_rate(lambda rate: -math.inf if rate > 2e-3 else rate, 1e-3) == (1e-3, False)


def test_of_equal_scores_the_nearest_to_the_default_counts() -> None:
    assert search_rate(lambda rate: 1.0, 3e-4) == (3e-4, False)


def test_the_best_rate_of_several_seeds_is_their_geometric_mean() -> None:
    assert BestRates((1e-3, 4e-3), edge=False).best == 2e-3
    assert BestRates((3e-4,), edge=False).best == 3e-4
