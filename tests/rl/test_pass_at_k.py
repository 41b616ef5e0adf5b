"""pass@k against all draws of k completions."""

from itertools import combinations

import pytest

from perl.rl.evaluate import measured_ks, pass_at_k


@pytest.mark.parametrize("right", [0, 1, 3, 7])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_the_share_of_draws_with_a_right_one(right: int, k: int) -> None:
    completions = [True] * right + [False] * (7 - right)
    draws = [any(draw) for draw in combinations(completions, k)]
    assert pass_at_k(completions, k) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (3, [1, 2]), (4, [1, 2, 4]), (11, [1, 2, 4, 8])])
def test_which_k_are_measured(n: int, ks: list[int]) -> None:
    assert measured_ks(n) == ks
