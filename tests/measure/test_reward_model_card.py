"""The card and its verdict: impostors are detected where 85 % of answers are rated up; good models pass."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from perl.data.records import Turn
from perl.measure.bootstrap import Floats
from perl.measure.metrics import probabilities
from perl.measure.rated_rows import RatedRows
from perl.measure.reward_model_card import RewardModelCard, reward_model_card
from perl.measure.tfidf_baseline import TfidfScores, tfidf_scores
from perl.measure.verdict import verdict
from perl.system.typed_json import as_json
from tests.measure.rated import Made, lengths, made, shuffled


@pytest.fixture(scope="module")
def data() -> Made:
    """Return a thousand answers for training and a thousand held out."""
    return made()


@pytest.fixture(scope="module")
def baseline(data: Made) -> TfidfScores:
    """Return the TF-IDF baseline on these answers."""
    return tfidf_scores(data.train, data.held_out)


def card_of(scores: Floats, data: Made, baseline: TfidfScores, **more: Any) -> RewardModelCard:
    """Return the card after checking that it is JSON."""
    card = reward_model_card(scores.tolist(), data.held_out, baseline, **more)
    json.dumps(as_json(card), allow_nan=False)
    assert card.majority_accuracy == pytest.approx(0.85)
    return card


def test_a_good_model_is_fit(data: Made, baseline: TfidfScores) -> None:
    card = card_of(2 * data.quality, data, baseline)
    assert card.verdict.fit, card.verdict
    assert len(card.verdict.reasons) == 5
    assert card.auroc > 0.9
    assert card.intervals["auroc"][0] < card.auroc < card.intervals["auroc"][1]
    # Centred for as many ups as downs, it is mostly wrong about 85 % ups: scaling mends that, AUROC never saw it.
    assert card.accuracy < card.majority_accuracy < 0.9
    assert card.calibration.ece_before > 0.2
    assert card.calibration.ece_after < 0.05


def by_shuffled_labels(data: Made) -> Floats:
    return tfidf_scores(shuffled(data.train), data.held_out).scores


IMPOSTORS: dict[str, tuple[Callable[[Made], Floats], str]] = {
    "constant": (lambda data: np.full(1000, 1.7), "no better than chance: AUROC 0.50"),
    "almost constant": (lambda data: 1.7 + (np.arange(1000) == 3), "no better than chance"),
    "shuffled labels": (by_shuffled_labels, "no better than chance"),
    "length": (lambda data: (lengths(data.held_out) - 50) / 10, "It only counts length (correlation +1.00"),
    "bent length": (lambda data: np.log(lengths(data.held_out)), "It only counts length"),
    "noisy length": (
        lambda data: lengths(data.held_out) / 10 + np.random.default_rng(0).normal(size=1000),
        "length",
    ),
    "words": (lambda data: tfidf_scores(data.train, data.held_out).scores, "no better than TF-IDF"),
    "upside down": (lambda data: -2 * data.quality, "worse than TF-IDF"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_not_fit(name: str, data: Made, baseline: TfidfScores) -> None:
    scorer, reason = IMPOSTORS[name]
    card = card_of(scorer(data), data, baseline)
    assert not card.verdict.fit
    assert reason in " ".join(card.verdict.reasons)


@pytest.mark.parametrize(
    ("ahead", "interval", "said"),
    [
        (0.09, (-0.02, 0.19), "not shown to be better than TF-IDF"),
        (-0.01, (-0.09, 0.07), "no better than TF-IDF"),
        (-0.2, (-0.3, -0.1), "worse than TF-IDF"),
    ],
)
def test_what_may_be_chance_is_said_to_be_no_more(
    ahead: float, interval: tuple[float, float], said: str, data: Made, baseline: TfidfScores
) -> None:
    card = card_of(2 * data.quality, data, baseline)
    behind = replace(card.tfidf_baseline, ahead=ahead, ahead_interval=interval)
    (reason,) = verdict(replace(card, tfidf_baseline=behind)).reasons
    assert said in reason


def test_the_majority_cannot_fool_it(data: Made, baseline: TfidfScores) -> None:
    """A constant thumb up is as accurate as the majority and calibrated after scaling, but not a reward model."""
    card = card_of(np.full(1000, 1.7), data, baseline)
    assert card.accuracy == card.majority_accuracy == pytest.approx(0.85)
    assert card.balanced_accuracy == card.auroc == 0.5
    assert card.intervals["auroc"] == (0.5, 0.5)
    assert card.calibration.ece_after < 0.05
    assert card.length.correlation is None


def test_length_ranks_all_but_not_among_like_lengths(data: Made, baseline: TfidfScores) -> None:
    card = card_of(lengths(data.held_out) / 10 - 5, data, baseline)
    assert card.auroc > 0.85
    assert card.tfidf_baseline.ahead_interval[0] > 0  # TF-IDF does not count, so this bar alone would be passed
    assert card.length.auroc_within < 0.65
    assert card.length.ahead_interval == (0.0, 0.0)


def test_scores_bent_out_of_shape_are_not_calibrated(data: Made, baseline: TfidfScores) -> None:
    """The ranking is as good as before, but all worse answers have nearly the same score."""
    card = card_of(np.exp(3 * data.quality), data, baseline)
    assert card.auroc > 0.9
    assert any(reason.startswith("Not calibrated") for reason in card.verdict.reasons), card.calibration


def test_training_dialogues_are_not_held_out(data: Made, baseline: TfidfScores) -> None:
    found = card_of(2 * data.quality, data, baseline, seen=40).verdict
    assert not found.fit
    assert found.reasons[0].startswith("40 of these 1,000 answers are from dialogues it was trained on")
    assert found.reasons[0].endswith("evaluate it on other data (data.eval_path or --data), or set neither.")
    # A published test part repeats a few training rows, which is reported and does not affect the verdict.
    found = card_of(2 * data.quality, data, baseline, seen=10).verdict
    assert found.fit
    assert found.reasons[0].endswith("dialogues it was not trained on, except for 10 that it has seen, or nearly.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": [True] * 1000}, "0 of 1,000 answers are rated down, and 30 of each label are needed"),
        ({"labels": [n >= 1 for n in range(1000)]}, "1 of 1,000 answers is rated down"),
        ({"labels": [n >= 29 for n in range(1000)]}, "29 of 1,000 answers are rated down"),
        ({"labels": [n < 29 for n in range(1000)]}, "29 of 1,000 answers are rated up"),
        ({"dialogues": [str(n % 9) for n in range(1000)]}, "from 9 dialogues, and 10 are needed"),
    ],
)
def test_too_few_to_tell(changes: dict[str, Any], reason: str, data: Made, baseline: TfidfScores) -> None:
    few = replace(data, held_out=replace(data.held_out, **changes))
    card = reward_model_card(data.quality.tolist(), few.held_out, baseline)
    json.dumps(as_json(card), allow_nan=False)
    assert not card.verdict.fit
    assert [reason in one for one in card.verdict.reasons] == [True]


def test_few_answers_seen_in_training_are_reported_as_both(data: Made, baseline: TfidfScores) -> None:
    card = card_of(2 * data.quality, data, baseline, seen=1000)
    few, seen = verdict(replace(card, up=29)).reasons
    assert few.startswith("Too few to tell")
    assert seen.startswith("1,000 of these 1,000 answers are from dialogues it was trained on")


def test_few_answers_may_be_off_by_chance(data: Made, baseline: TfidfScores) -> None:
    """The limit of 0.05 is too strict for a hundred answers: even perfect probabilities exceed it."""
    card = card_of(2 * data.quality, data, baseline)
    off = replace(card.calibration, ece_after=0.07, ece_by_chance=0.08)
    assert verdict(replace(card, calibration=off)).fit
    assert "0.080 may be chance" in " ".join(verdict(replace(card, calibration=off)).reasons)
    assert not verdict(replace(card, calibration=replace(off, ece_by_chance=0.06))).fit


def test_gold_is_the_truth(data: Made, baseline: TfidfScores) -> None:
    """Labels that agree with the scores do not help where the gold judge does not."""
    random = np.random.default_rng(0)
    gold = random.random(1000) < 0.5
    fooled = card_of_gold(2 * data.quality, data, baseline, gold.tolist())
    assert fooled.auroc_labels > 0.9
    assert fooled.intervals["auroc_labels"][0] > 0.85
    assert not fooled.verdict.fit
    assert "AUROC against the gold judge 0.5" in fooled.verdict.reasons[0]
    # Noisy labels, and a judge that knows: metrics are the judge's, probabilities the labels'.
    good = data.quality > np.quantile(data.quality, 0.3)
    labels = np.where(random.random(1000) < 0.1, ~good, good).tolist()
    noisy = replace(data, held_out=replace(data.held_out, labels=labels))
    card = card_of_gold(10 * (data.quality + 0.52), noisy, baseline, good.tolist())
    assert card.auroc == 1.0
    assert card.auroc_labels < 0.95
    assert card.ece < 0.06 < card.calibration.ece_before
    assert card.up == 700


def card_of_gold(scores: Floats, data: Made, baseline: TfidfScores, gold: list[bool]) -> RewardModelCard:
    return reward_model_card(scores.tolist(), replace(data.held_out, gold=gold), baseline)


def test_slices(data: Made, baseline: TfidfScores) -> None:
    """Slices are by kind, depth, length and source; each set adds up to the whole; small ones are only counted."""
    answers = replace(data.held_out, sources=["tiny" if n < 29 else "shop" for n in range(1000)])
    card = reward_model_card((2 * data.quality).tolist(), answers, baseline)
    found = {(one.by, one.name): one for one in card.slices}
    for by in ("kind of answer", "depth of dialogue", "length of answer", "source"):
        assert sum(one.n for one in card.slices if one.by == by) == 1000
    calls = found["kind of answer", "API call"]
    assert calls.n == 200
    rows = np.arange(0, 1000, 5)
    labels = np.array(answers.labels)[rows]
    ups, downs = data.quality[rows][labels], data.quality[rows][~labels]
    assert calls.share_up == pytest.approx(labels.mean())
    assert calls.auroc == pytest.approx((ups[:, None] > downs).mean())
    assert calls.interval[0] < calls.auroc <= calls.interval[1]
    assert 0 < calls.ece < 0.15
    assert ("depth of dialogue", "7 turns before") in found
    tiny = found["source", "tiny"]
    assert tiny.n == 29
    assert tiny.auroc is None
    assert tiny.ece is None


def test_mistakes_are_the_worst_and_cut() -> None:
    count = 8
    answers = RatedRows(
        contexts=[(Turn("user", f"{'long ' * 100}question {n}"), Turn("api", "{}")) for n in range(count)],
        answers=[Turn("agent", f"answer {n}{' and so on' * 60}") for n in range(count)],
        dialogues=[str(n) for n in range(count)],
        sources=["shop"] * count,
        labels=[n % 2 == 0 for n in range(count)],
        gold=None,
        pairs=[],
    )
    card = reward_model_card([float(n) for n in range(count)], answers, TfidfScores(np.zeros(count), 1, 1))
    high, low = card.mistakes.downs_scored_high, card.mistakes.ups_scored_low
    assert [one.answer[:8] for one in high] == ["answer 7", "answer 5", "answer 3", "answer 1"]
    assert [one.answer[:8] for one in low] == ["answer 0", "answer 2", "answer 4", "answer 6"]
    assert high[0].score == 7.0
    assert high[0].probability == pytest.approx(probabilities(np.array([7.0]))[0])
    assert high[0].context.startswith("… ")
    assert high[0].context.endswith("question 7\napi: {}")
    assert all(len(one.context) <= 302 and len(one.answer) <= 302 for one in high + low)


def test_answers_to_one_context_are_paired() -> None:
    """Up and down in one context: (5 > 1), (0 < 1) in the first, none in the second, (2 = 2) in the third."""
    contexts = [(Turn("user", name),) for name in "aaabcc"]
    answers = RatedRows(
        contexts=contexts,
        answers=[Turn("agent", str(n)) for n in range(6)],
        dialogues=list("aaabcc"),
        sources=["shop"] * 6,
        labels=[True, True, False, True, False, True],
        gold=None,
        pairs=[],
    )
    card = reward_model_card([5.0, 0.0, 1.0, 9.0, 2.0, 2.0], answers, TfidfScores(np.zeros(6), 1, 1))
    assert card.pairs == 3
    assert card.pairwise_accuracy == pytest.approx(1.5 / 3)
    assert card.intervals["pairwise_accuracy"] == pytest.approx((0.5, 0.5))


def compared(count: int = 600) -> tuple[RatedRows, Floats]:
    """Return pairs of answers, the better first and slightly more often the longer, with their qualities."""
    random = np.random.default_rng(0)
    quality = np.sort(random.normal(size=(count, 2)), axis=1)[:, ::-1].T.ravel()
    words = 5 + random.poisson(np.clip(10 + 2 * quality, 1, None))
    answers = RatedRows(
        contexts=[(Turn("user", f"question {n}"),) for n in range(count)] * 2,
        answers=[Turn("agent", " ".join(f"w{random.integers(30)}" for _ in range(n))) for n in words],
        dialogues=[str(n) for n in range(count)] * 2,
        sources=["shop"] * (2 * count),
        labels=[True] * count + [False] * count,
        gold=None,
        pairs=[(n, count + n) for n in range(count)],
    )
    return answers, quality


def test_pairs_alone() -> None:
    """A constant that a context adds to both answers does not affect the verdict."""
    answers, quality = compared()
    baseline = tfidf_scores(answers, answers)
    baseline = replace(baseline, scores=np.random.default_rng(1).normal(size=1200))
    moved = quality + np.tile(np.random.default_rng(2).normal(scale=5.0, size=600), 2)
    noisy = quality + np.random.default_rng(3).normal(scale=0.3, size=1200)
    card = reward_model_card(noisy.tolist(), answers, baseline)
    assert card.verdict.fit, card.verdict
    assert "pairwise accuracy" in " ".join(card.verdict.reasons)
    assert card.compared
    assert card.calibration.intercept == 0.0
    far = reward_model_card(moved.tolist(), answers, baseline)
    assert far.pairwise_accuracy == 1.0
    assert far.verdict.fit, far.verdict
    counting = reward_model_card((lengths(answers) / 10).tolist(), answers, baseline)
    assert not counting.verdict.fit
    assert "length" in " ".join(counting.verdict.reasons)
    constant = reward_model_card([0.0] * 1200, answers, baseline)
    assert constant.pairwise_accuracy == 0.5
    assert not constant.verdict.fit
    few = replace(answers, labels=[True] * 20 + [False] * 20, pairs=[(n, 20 + n) for n in range(20)])
    few = RatedRows(**{name: getattr(few, name)[:40] if name != "gold" else None for name in vars(few)})
    card = reward_model_card([0.0] * 40, few, TfidfScores(np.zeros(40), 1, 1))
    assert "there are 20 pairs" in card.verdict.reasons[0]


def test_pairs_are_measured_by_pairwise_accuracy() -> None:
    """No metric depends on a constant added to the scores of a context; slices add up to the whole."""
    answers, quality = compared()
    answers = replace(answers, sources=["shop" if n % 3 else "cinema" for n in range(600)] * 2)
    random = np.random.default_rng(4)
    members = quality + random.normal(size=(3, 1200))
    scores = members.mean(0)
    moved = members + np.tile(random.normal(scale=50.0, size=600), 2)
    baseline = TfidfScores(random.normal(size=1200), 1, 1)
    card = reward_model_card(members, answers, baseline, log_odds=False)
    assert as_json(reward_model_card(moved, answers, baseline, log_odds=False)) == near(as_json(card))
    right = scores[:600] > scores[600:]
    differences = np.concatenate([scores[:600] - scores[600:], scores[600:] - scores[:600]])
    assert card.auroc == pytest.approx(roc_auc_score([1] * 600 + [0] * 600, differences))
    assert card.metric == "pairwise accuracy"
    assert card.ranked == (card.pairwise_accuracy, card.intervals["pairwise_accuracy"])
    assert card.accuracy == card.balanced_accuracy == card.pairwise_accuracy == accuracy_score([1] * 600, right)
    for by in ("kind of better answer", "depth of dialogue", "length of better answer", "source"):
        parts = [one for one in card.slices if one.by == by]
        assert sum(one.n for one in parts) == 600
        assert sum(one.n * one.auroc for one in parts) == pytest.approx(right.sum())
        assert all(one.interval[0] < one.auroc < one.interval[1] for one in parts)
        assert all(one.share_up is None and one.ece is None for one in parts)
    cinema = next(one for one in card.slices if one.name == "cinema")
    assert cinema.auroc == pytest.approx(right[::3].mean())
    assert card.ensemble.auroc == pytest.approx((members[:, :600] > members[:, 600:]).mean(1))
    assert card.ensemble.ahead == pytest.approx(card.pairwise_accuracy - np.mean(card.ensemble.auroc))
    longer = lengths(answers)[:600] - lengths(answers)[600:]
    assert card.length.auroc_of_length == pytest.approx(np.heaviside(longer, 0.5).mean())
    assert abs(card.length.auroc_within - card.pairwise_accuracy) < 0.03
    high, low = card.mistakes.downs_scored_high, card.mistakes.ups_scored_low
    worst = np.argsort(scores[:600] - scores[600:])[:5]
    assert [one.answer for one in high] == [answers.answers[600 + n].text for n in worst]
    assert [one.answer for one in low] == [answers.answers[n].text for n in worst]
    assert high[0].score == pytest.approx(scores[600 + worst[0]] - scores[worst[0]])
    assert high[0].probability == pytest.approx(1 - low[0].probability)


def test_pairs_in_the_right_order_are_no_mistakes() -> None:
    answers, quality = compared()
    card = reward_model_card(quality.tolist(), answers, TfidfScores(np.zeros(1200), 1, 1))
    assert not card.mistakes.downs_scored_high
    assert not card.mistakes.ups_scored_low


def near(value: Any) -> Any:
    """Return the value with floats that compare equal up to rounding."""
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    if isinstance(value, list):
        return [near(one) for one in value]
    return pytest.approx(value, abs=1e-6) if isinstance(value, float) else value


def test_pairs_beside_ratings(data: Made, baseline: TfidfScores) -> None:
    """They provide only the pairwise accuracy."""
    pairs, quality = compared(50)
    both = RatedRows(
        contexts=data.held_out.contexts + pairs.contexts,
        answers=data.held_out.answers + pairs.answers,
        dialogues=data.held_out.dialogues + pairs.dialogues,
        sources=data.held_out.sources + pairs.sources,
        labels=data.held_out.labels,
        gold=None,
        pairs=[(1000 + better, 1000 + worse) for better, worse in pairs.pairs],
    )
    alone = reward_model_card((2 * data.quality).tolist(), data.held_out, baseline)
    card = reward_model_card([*(2 * data.quality), *quality], both, baseline)
    assert card.pairwise_accuracy == 1.0
    assert card.pairs == 50
    assert not card.compared
    for name in ("n", "auroc", "accuracy", "calibration", "slices", "length", "tfidf_baseline", "verdict"):
        assert getattr(card, name) == getattr(alone, name), name
