"""Verdicts claim no more than the metrics support; numbers are formatted as people write them."""

from typing import Any

import pytest

from perl.measure.reward_model_card import RewardModelCard
from perl.report import words
from perl.report.numbers import (
    GAP,
    Spread,
    bytes_text,
    count_text,
    decimal,
    flops_text,
    joined,
    number,
    percent,
    seconds_text,
    signed,
    spread,
    spread_text,
)
from perl.report.outcome import mean_change
from perl.report.tunings import CostRow, QualityRow, balance, bottom_line
from perl.results import SftEval
from perl.rl.results import RlEval
from perl.system.typed_json import made
from tests.report.made import make_reward_model_card


def _rl(**metrics: Any) -> RlEval:
    given = {"algorithm": "ppo", "critic": "shared", "steps": 9, "n": 128, "reward_before": 0.1, "kl": 1.0}
    lengths = {"answer_tokens_before": 9.0, "answer_tokens_after": 9.0, "ended_before": 1.0, "ended_after": 1.0}
    return made(RlEval, given | lengths | {"reward_after": 0.9} | metrics)


class _Group:
    """The part of a group that a verdict reads."""

    def __init__(
        self, *rl: RlEval, reward: list[RewardModelCard] | None = None, sft: list[SftEval] | None = None
    ) -> None:
        self.rl, self.reward, self.sft, self.runs = list(rl), reward or [], sft or [], ()


def _verdict(*rl: RlEval, **more: Any) -> words.Finding:
    return words.verdict(_Group(*rl, **more))  # type: ignore[arg-type]


ROSE, FELL, OPEN = ({"reward_interval": ends} for ends in ((0.5, 1.1), (-1.1, -0.5), (-0.1, 0.2)))
WORSE = {"gold_before": 0.75, "gold_after": 0.5, "gold_interval": (-0.35, -0.15)}


@pytest.mark.parametrize(
    ("metrics", "headline", "kind"),
    [
        ({"gold_before": 0.5, "gold_after": 0.75, "gold_interval": (0.15, 0.35)}, "The policy is better.", "good"),
        ({"gold_before": 0.5, "gold_after": 0.55, "gold_interval": (-0.05, 0.15)}, "No clear difference.", "open"),
        ({"gold_before": 0.5, "gold_after": 0.75} | ROSE, "The policy cannot be judged.", "open"),
        (WORSE | ROSE, "The policy is worse, although its reward rose.", "bad"),
        (WORSE | OPEN, "The policy is worse.", "bad"),
        (WORSE, "The policy is worse.", "bad"),
        (ROSE, "The reward rose; nothing else has checked it.", "open"),
        (FELL | {"reward_after": -0.7}, "The reward fell.", "bad"),
        (OPEN, "No clear difference.", "open"),
        ({}, "The policy cannot be judged.", "open"),
    ],
)
def test_verdict(metrics: dict[str, Any], headline: str, kind: str) -> None:
    """It uses the gold judge if there is one, else the reward, with a note that nothing else has checked it."""
    found = _verdict(_rl(**metrics))
    assert (found.headline, found.kind) == (headline, kind)


def test_a_reward_that_changed_on_no_prompt_asks_for_no_more_prompts() -> None:
    lines = " ".join(_verdict(_rl(reward_after=0.1, reward_interval=(0.0, 0.0))).lines)
    assert "did not change on any prompt" in lines
    assert "(the change is 0 in every dialogue)" in lines
    assert "eval_prompts" not in lines


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (ROSE, "The reward rose, 0.10 before and 0.90 after (95 % interval of the change: +0.50 to +1.10)."),
        (FELL | {"reward_after": -0.7}, "The reward fell, 0.10 before and −0.70 after"),
        (OPEN | {"reward_after": 0.15}, "The reward did not clearly change, 0.10 before and 0.15 after"),
        ({"reward_after": 0.15}, "The reward was 0.10 before and 0.15 after."),
        (
            {"reward_before": -1118.0, "reward_after": 5602.0, "reward_interval": (6300.0, 7113.0)},
            "The reward rose, −1118 before and 5602 after (95 % interval of the change: +6300 to +7113).",
        ),
    ],
)
def test_the_reward_rose_only_where_its_interval_excludes_0(metrics: dict[str, Any], said: str) -> None:
    assert _verdict(_rl(**metrics)).lines[0].replace(GAP, " ").startswith(said)


@pytest.mark.parametrize(
    ("interval", "verb", "kind"),
    [
        ((-0.0051, -0.0029), "hardly changed", "open"),
        ((-0.0051, 0.0009), "hardly changed", "open"),
        ((-0.0080, 0.0009), "did not clearly change", "open"),
        ((-0.0080, -0.0009), "fell", "good"),
        ((0.0009, 0.0080), "rose", "bad"),
    ],
)
def test_a_loss_fell_only_where_its_interval_excludes_0_and_hardly_changed_within_2_percent(
    interval: tuple[float, float], verb: str, kind: str
) -> None:
    found = _verdict(sft=[SftEval(n=270, loss_before=0.264, loss_after=0.26, loss_interval=interval)])
    assert (found.headline, found.kind) == (f"The loss on held-out answers {verb}.", kind)
    said = found.lines[0].replace("−", "-")
    assert said.startswith(f"The loss on held-out answers {verb}, 0.2640 before and 0.2600 after SFT (95 %")
    assert said.endswith(f"{interval[0]:+.4f} to {interval[1]:+.4f}).")


def test_a_loss_without_an_interval_is_told_and_not_judged() -> None:
    found = _verdict(sft=[SftEval(n=270, loss_before=1.31, loss_after=0.42)])
    assert (found.headline, found.kind) == ("The loss cannot be judged.", "open")
    assert found.lines[0] == "The loss on held-out answers was 1.31 before and 0.42 after SFT."


def test_the_loss_of_several_seeds_has_the_interval_of_their_mean() -> None:
    one = SftEval(n=270, loss_before=1.3, loss_after=0.4, loss_interval=(-1.0, -0.8))
    assert _verdict(sft=[one, one]).lines[0].replace("−", "-").endswith("-0.97 to -0.83; down in 2 of 2 seeds).")


def test_verdict_evidence() -> None:
    """The evidence has both values, the interval in points, and the number of seeds that agree."""
    seeds = [_rl(gold_before=0.5, gold_after=0.75, gold_interval=(0.15, 0.35))] * 2
    evidence = " ".join(_verdict(*seeds).lines).replace(GAP, " ")
    assert "50 % of the completions right before RL and 75 % after" in evidence
    assert "+17.9 to +32.1 points; up in 2 of 2 seeds" in evidence


def test_the_interval_over_runs() -> None:
    """For several runs it is the interval of the mean; there is none if a run has none."""
    narrow = _rl(gold_before=0.5, gold_after=0.55, gold_interval=(0.01, 0.09))
    assert _verdict(narrow).headline == "The policy is better."
    assert "+1.0 to +9.0 points" in _verdict(narrow).lines[0]
    two = mean_change([_rl(reward_interval=(0.1, 0.5)), _rl(reward_interval=(0.3, 0.7))], "reward")
    assert two is not None
    assert two.interval == pytest.approx((0.4 - 0.2 / 2**0.5, 0.4 + 0.2 / 2**0.5))
    one_of_two = mean_change([_rl(reward_interval=(0.1, 0.5)), _rl()], "reward")
    assert one_of_two is not None
    assert one_of_two.interval is None


def test_gold_needs_every_run() -> None:
    """A mean over only some runs would not be comparable with the mean reward."""
    assert mean_change([_rl(gold_before=0.5, gold_after=0.6), _rl()], "gold") is None
    assert mean_change([], "reward") is None


def _card(**metrics: Any) -> RewardModelCard:
    return made(RewardModelCard, make_reward_model_card() | metrics)


@pytest.mark.parametrize(
    ("fit", "headline", "kind"),
    [
        (True, "The reward model is fit for RL.", "good"),
        (False, "The reward model is not fit for RL.", "bad"),
    ],
)
def test_reward_model_alone(fit: bool, headline: str, kind: str) -> None:
    """Without RL, the verdict is on the reward model, with its reasons."""
    found = _verdict(reward=[_card(verdict={"fit": fit, "reasons": ["Because."]})])
    assert (found.headline, found.kind) == (headline, kind)
    assert found.lines == ["Because.", "There was no RL."]


def test_reward_model_words() -> None:
    """The AUROC is given as odds, and a classifier no better than the majority label is called that."""
    assert "91 times in 100" in words.reward_model_words([_card(auroc=0.913)])[0]
    assert "gold judge calls" in words.reward_model_words([_card(against="gold")])[0]
    assert "people rated" in words.reward_model_words([_card(against="labels")])[0]
    assert "undefined" in words.reward_model_words([_card(auroc=None)])[0]
    assert "useless here" in words.reward_model_words([_card(accuracy=0.68, majority_accuracy=0.8)])[1]
    assert len(words.reward_model_words([_card()])) == 1


def test_balance() -> None:
    """Losses are stated like gains, and differences that the seeds cannot show are said to be unknown."""
    costs = [
        CostRow("RL", "peak memory", Spread(1.0, None, 1), Spread(2.0, None, 1), bytes_text),
        CostRow("RL", "tokens per second", Spread(90.0, None, 1), Spread(100.0, None, 1), str),
    ]
    qualities = [
        QualityRow("Reward at the end", Spread(0.5, 0.01, 3), Spread(0.7, 0.01, 3)),
        QualityRow("Gold judge at the end", Spread(0.5, 0.1, 3), Spread(0.55, 0.1, 3)),
        QualityRow("KL at the end", Spread(1.0, 0.1, 3), Spread(2.0, 0.1, 3)),
    ]
    sides = balance(costs, qualities)
    assert sides.ahead == [f"Less memory: RL (×{GAP}0.50)."]
    assert sides.behind == [
        f"Slower, in tokens per second: RL (×{GAP}0.90).",
        "Reward at the end: 0.50 against 0.70.",
    ]
    assert len(sides.open) == 1
    assert bottom_line(qualities, "LoRA").startswith("No difference shown")
    assert bottom_line(qualities[:1], "LoRA").startswith("Yes, full tuning is better")
    alone = QualityRow("Reward at the end", Spread(1, None, 1), Spread(2, None, 1))
    assert bottom_line([alone], "dora").startswith("Not known: with a single run, a difference may be chance")
    assert "dora 1.00, full tuning 2.00" in bottom_line([alone], "dora")


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
        (decimal(0.9977), "0.998"),
        (decimal(0.99997, 3), "0.99997"),
        (decimal(1.0), "1.00"),
        (decimal(-0.001), "0.00"),
        (decimal(-1.5), "−1.50"),
        (decimal(3787878.86), "3.7879e6"),
        (decimal(-1.5e-6, 7), "−1.5e−6"),
        (number(2e-6), "+2.0e−6"),
        (number(-0.0123), "−0.012"),
        (number(0.0), "+0.00"),
        (number(-4e12), "−4.0000e12"),
        (signed(0.3), "+0.30"),
        (signed(-0.3), "−0.30"),
        (spread_text(spread([0.7, 0.8, 0.9, None])), "0.80 ± 0.10"),
        (spread_text(spread([0.7, 0.9]), sign=True), "+0.80 ± 0.14"),
        (spread_text(spread([0.7])), "0.70"),
        (spread_text(spread([None, float("nan")])), "–"),
        (joined(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers(found: str, text: str) -> None:
    """They are formatted as people write them."""
    assert found.replace(GAP, " ") == text
