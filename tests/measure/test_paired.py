"""Intervals of a change cover the truth about 95 times in 100, also for few prompts."""

import numpy as np
import pytest

from perl.measure.change import equal_words
from perl.measure.paired import TokenLosses, changes


def interval(change: list[float], dialogues: list[str] | None = None) -> tuple[float, float] | None:
    names = dialogues or [str(n) for n in range(len(change))]
    before = np.random.default_rng(0).normal(scale=5.0, size=len(change))
    found = changes({"reward": before.tolist()}, {"reward": (before + change).tolist()}, names)["reward"]
    assert found.before == pytest.approx(before.mean())
    assert found.after == pytest.approx((before + change).mean())
    return found.interval


@pytest.mark.parametrize("prompts", [2, 4, 24, 128])
def test_an_interval_holds_the_true_change_about_95_times_in_100(prompts: int) -> None:
    draw, held, runs = np.random.default_rng(prompts), 0, 300
    for _ in range(runs):
        low, high = interval((0.3 + draw.normal(size=prompts)).tolist()) or (0.0, 0.0)
        held += low <= 0.3 <= high
    assert 0.91 < held / runs <= 0.99


def test_pairs_count_not_the_spread_of_prompts() -> None:
    """The spread of prompts is 5, that of the change 0.1, which determines the interval."""
    low, high = interval((0.2 + 0.1 * np.random.default_rng(1).normal(size=100)).tolist()) or (0.0, 0.0)
    assert 0.15 < low < high < 0.25
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 10, rel=0.25)


def test_prompts_of_one_dialogue_are_drawn_together() -> None:
    of_dialogue = np.random.default_rng(2).normal(size=10)
    change = np.repeat(of_dialogue, 20).tolist()
    apart = interval(change) or (0.0, 0.0)
    together = interval(change, [str(n // 20) for n in range(200)]) or (0.0, 0.0)
    assert together[1] - together[0] > 3 * (apart[1] - apart[0])


def test_where_all_prompts_change_equally_this_is_said_and_no_interval() -> None:
    assert equal_words(interval([0.1] * 7)) == "equal in every dialogue"
    assert equal_words(interval([0.0] * 7)) == "0 in every dialogue"
    assert equal_words(interval([0.1] * 6 + [0.1001])) is None
    assert equal_words(None) is None


def test_of_one_dialogue_nothing_can_be_said() -> None:
    assert interval([1.0, 1.1, 0.9], ["a", "a", "a"]) is None


def test_a_loss_is_over_tokens_and_its_interval_that_of_a_ratio() -> None:
    """Reference: the delta method's standard error of a ratio of sums, for rows of very different lengths."""
    draw = np.random.default_rng(3)
    tokens = draw.integers(1, 40, size=300)
    before, change = draw.gamma(2.0, tokens), -0.05 * tokens + draw.normal(size=300)
    losses, after = (TokenLosses(one.tolist(), tokens.tolist()) for one in (before, before + change))
    assert losses.mean == pytest.approx(before.sum() / tokens.sum())
    low, high = losses.interval_to(after, [str(n) for n in range(300)]) or (0.0, 0.0)
    rate = change.sum() / tokens.sum()
    error = np.sqrt((change - rate * tokens).var() / 300) / tokens.mean()
    assert (low, high) == pytest.approx((rate - 1.96 * error, rate + 1.96 * error), rel=0.15)
    assert losses.interval_to(after, ["a"] * 300) is None
    diverged = TokenLosses([float("nan"), *after.sums[1:]], after.tokens)
    assert losses.interval_to(diverged, [str(n) for n in range(300)]) is None
