"""Verdicts say what the figures bear, no more; numbers read as people write them."""

from typing import Any

import pytest

from perl.page import words
from perl.page.compare import CostRow, QualityRow
from perl.page.numbers import (
    GAP,
    Spread,
    bytes_text,
    count_text,
    decimal,
    flops_text,
    joined,
    percent,
    seconds_text,
    signed,
    spread,
    spread_text,
)
from perl.page.outcome import gold_change, reward_change, share_interval
from perl.page.schema import RewardEval, RlEval
from perl.page.tunings import balance, bottom_line


def _rl(**figures: Any) -> RlEval:
    given = {"algorithm": "ppo", "steps": 9, "n": 128, "reward_before": 0.1, "reward_after": 0.9, "kl": 1.0}
    return RlEval(**(given | figures))


class _Group:
    """As much of a group as a verdict reads."""

    def __init__(self, *rl: RlEval, reward: list[RewardEval] | None = None) -> None:
        self.rl, self.reward, self.runs = list(rl), reward or [], ()


def _verdict(*rl: RlEval, reward: list[RewardEval] | None = None) -> words.Verdict:
    return words.verdict(_Group(*rl, reward=reward))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("figures", "headline", "kind"),
    [
        ({"gold_before": 0.5, "gold_after": 0.75}, "The policy is better.", "good"),
        ({"gold_before": 0.5, "gold_after": 0.55}, "No clear difference.", "open"),
        ({"gold_before": 0.75, "gold_after": 0.5}, "The policy is worse, although its reward rose.", "bad"),
        ({"gold_before": 0.75, "gold_after": 0.5, "reward_after": 0.0}, "The policy is worse.", "bad"),
        ({}, "The reward rose; nothing else has checked it.", "open"),
        ({"reward_after": 0.0}, "The reward did not rise.", "bad"),
        (
            {"reward_before_interval": (-1.0, 1.2), "reward_after_interval": (0.0, 1.8)},
            "No clear difference.",
            "open",
        ),
    ],
)
def test_verdict(figures: dict[str, Any], headline: str, kind: str) -> None:
    """By the gold judge if there is one; else the reward, and that nothing else has checked it."""
    found = _verdict(_rl(**figures))
    assert (found.headline, found.kind) == (headline, kind)


def test_verdict_evidence() -> None:
    """Both ends, the interval in points, and how many seeds agree."""
    seeds = [_rl(gold_before=0.5, gold_after=0.75, n=98), _rl(gold_before=0.5, gold_after=0.75, n=98)]
    evidence = _verdict(*seeds).evidence.replace(GAP, " ")
    assert "50 % of the answers right before RL and 75 % after" in evidence
    assert "+15.3 to +33.7 points; up in 2 of 2 seeds" in evidence


def test_share_interval() -> None:
    """(49 + 1) / 100 and (73.5 + 1) / 100: a rise of .245, variance (.25 + .745 · .255) / 100."""
    rise, error = share_interval(0.5, 0.75, 98)
    assert rise == pytest.approx(0.245)
    assert error == pytest.approx(0.0663306, rel=1e-5)


def test_own_interval_of_the_change() -> None:
    """An interval that the report gives, of paired answers, counts before the page's own."""
    narrow = _rl(gold_before=0.5, gold_after=0.55, gold_change_interval=(0.01, 0.09))
    assert _verdict(narrow).headline == "The policy is better."
    assert "+1.0 to +9.0 points" in _verdict(narrow).evidence
    wide = reward_change([_rl(reward_change_interval=(-0.1, 1.7))])
    assert wide is not None
    assert wide.interval == pytest.approx((-0.1, 1.7))


def test_gold_needs_every_run() -> None:
    """A mean over some of the runs would not be that of the reward beside it."""
    assert gold_change([_rl(gold_before=0.5, gold_after=0.6), _rl()]) is None
    assert gold_change([]) is None
    assert reward_change([]) is None


def _card(**figures: Any) -> RewardEval:
    given = {
        "n": 100,
        "auroc": 0.9,
        "balanced_accuracy": 0.8,
        "accuracy": 0.8,
        "majority_accuracy": 0.5,
        "ece": 0.05,
    }
    return RewardEval(**(given | figures))


@pytest.mark.parametrize(
    ("auroc", "headline", "kind"),
    [
        (0.95, "The reward model ranks answers very well.", "good"),
        (0.65, "The reward model ranks answers weakly.", "open"),
        (0.5, "The reward model hardly beats a coin.", "bad"),
        (None, "The reward model cannot be judged.", "open"),
    ],
)
def test_reward_model_alone(auroc: float | None, headline: str, kind: str) -> None:
    """Without RL the reward model is judged."""
    found = _verdict(reward=[_card(auroc=auroc)])
    assert (found.headline, found.kind) == (headline, kind)


def test_card_words() -> None:
    """AUROC as odds, accuracy beside the majority's, calibration in points."""
    assert "91 times in 100" in words.auroc_words([_card(auroc=0.913)])
    assert "gold judge calls" in words.auroc_words([_card(against="gold")])
    assert "worth nothing" in words.accuracy_words([_card(accuracy=0.68, majority_accuracy=0.8)])
    assert "worth nothing" not in words.accuracy_words([_card()])
    assert "off by 5 points" in words.calibration_words([_card()])


def test_balance() -> None:
    """Losses are as plain as gains, and what seeds cannot tell is said."""
    costs = [
        CostRow("RL", "peak memory", Spread(1.0, None, 1), Spread(2.0, None, 1), bytes_text),
        CostRow("RL", "tokens a second", Spread(90.0, None, 1), Spread(100.0, None, 1), str),
    ]
    qualities = [
        QualityRow("Reward at the end", Spread(0.5, 0.01, 3), Spread(0.7, 0.01, 3)),
        QualityRow("Gold judge at the end", Spread(0.5, 0.1, 3), Spread(0.55, 0.1, 3)),
        QualityRow("KL at the end", Spread(1.0, 0.1, 3), Spread(2.0, 0.1, 3)),
    ]
    sides = balance(costs, qualities)
    assert sides.ahead == [f"Less memory: RL (×{GAP}0.50)."]
    assert sides.behind == [
        f"Slower, by tokens a second: RL (×{GAP}0.90).",
        "Reward at the end: 0.50 against 0.70.",
    ]
    assert len(sides.open) == 1
    assert bottom_line(qualities).startswith("No difference shown")
    assert bottom_line(qualities[:1]).startswith("Yes, full tuning is better")
    assert bottom_line([QualityRow("Reward at the end", Spread(1, None, 1), Spread(2, None, 1))]).startswith(
        "Not known"
    )


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (bytes_text(1_661_079_552), "1.7 GB"),
        (bytes_text(431_073_612), "431 MB"),
        (bytes_text(999_600_000), "1.0 GB"),
        (bytes_text(12), "12 B"),
        (count_text(123_008), "123k"),
        (count_text(8_798_208), "8.8M"),
        (count_text(128), "128"),
        (flops_text(3.2e15), "3.2 PFLOP"),
        (seconds_text(8.26), "8.3 s"),
        (seconds_text(59.7), "1 min 00 s"),
        (seconds_text(252), "4 min 12 s"),
        (seconds_text(3599.9), "1 h 00 min"),
        (seconds_text(7500), "2 h 05 min"),
        (percent(0.5266), "53 %"),
        (decimal(-0.001), "0.00"),
        (decimal(-1.5), "−1.50"),
        (signed(0.3), "+0.30"),
        (signed(-0.3), "−0.30"),
        (spread_text(spread([0.7, 0.8, 0.9, None]), count=True), "0.80 ± 0.10 (n = 3)"),
        (spread_text(spread([0.7])), "0.70"),
        (spread_text(spread([None, float("nan")])), "–"),
        (joined(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers(found: str, text: str) -> None:
    """As people write them."""
    assert found.replace(GAP, " ") == text
