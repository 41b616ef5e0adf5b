"""Fit for RL or not, and why: the bars a reward model has to pass, each with its figure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_OF_A_CLASS = 30
LEAST_DIALOGUES = 10
"""The intervals are over dialogues: of fewer they mean nothing."""
ECE_ALLOWED = 0.05
SEEN_ALLOWED = 0.01
"""Share of the answers: published test parts repeat a few training rows, and so few change no figure by more."""
MOSTLY_LENGTH = 0.8
"""Spearman's correlation with length from which on a scorer is said to count."""

Card = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether to train a policy against the model, and the reasons: the bars not passed, or all of them passed."""

    fit: bool
    reasons: list[str]


@dataclass(frozen=True)
class _Bar:
    passed: bool
    words: str


def verdict(card: Card) -> Verdict:
    """The verdict on a card (`perl.measure.reward_model_card.reward_card`).

    Fit means shown to be fit, on these answers: the end of each 95 % interval has to be on the right side. So
    a model that is not shown to be better than TF-IDF with logistic regression, the interval of the difference
    including 0, is not fit: nothing shows that it reads more than single words, and what rewards single words
    is what a policy exploits first. If it is better all the same, more held-out answers will show it.

    Accuracy is no bar: with 86 % thumbs up a constant has 86 %. AUROC and the differences are blind to the
    share of ups.
    """
    bars = list(_can_tell(card))
    if all(bar.passed for bar in bars):
        bars = [_unseen(card), *_ranks(card), _calibrated(card)]
    failed = [bar.words for bar in bars if not bar.passed]
    return Verdict(not failed, failed or [bar.words for bar in bars])


def _can_tell(card: Card) -> Iterator[_Bar]:
    """Whether there are answers enough to say anything."""
    downs = card["n"] - card["up"]
    fewer, kind = min((card["up"], "up"), (downs, "down"))
    if card["compared"]:
        what = f"there are {card['pairs']} pairs"
    else:
        what = f"of {card['n']:,} answers {fewer:,} are rated {kind}"
    yield _Bar(fewer >= LEAST_OF_A_CLASS, f"Too few to tell: {what}, and {LEAST_OF_A_CLASS} are needed.")
    yield _Bar(
        card["dialogues"] >= LEAST_DIALOGUES,
        f"Too few to tell: the answers are of {card['dialogues']} dialogues, and {LEAST_DIALOGUES} are needed.",
    )


def _unseen(card: Card) -> _Bar:
    seen, n = card["seen_in_training"], card["n"]
    if seen > SEEN_ALLOWED * n:
        words = (
            f"{seen:,} of these {n:,} answers are of dialogues it was trained on, or nearly the same as answers "
            "it was trained on, which flatters it; without --data the run's own held-out part is judged."
        )
        return _Bar(False, words)
    words = f"Judged on {n:,} answers of {card['dialogues']:,} dialogues it was not trained on."
    return _Bar(True, f"{words[:-1]}, but for {seen:,} that it has seen, or nearly." if seen else words)


def _ranks(card: Card) -> Iterator[_Bar]:
    """Better than a coin; if so, better than counting words, and than counting characters."""
    key = card["floor"]["figure"]
    name = "pairwise accuracy" if key == "pairwise_accuracy" else "AUROC"
    against = " against the gold judge" if card["against"] == "gold" else ""
    told = f"{name}{against} {card[key]:.2f} ({_ends(card['intervals'][key])})"
    above = _above(card["intervals"][key], 0.5)
    yield _Bar(above, f"It ranks {'better' if above else 'no better'} than a coin: {told}.")
    yield _beats_words(card["floor"], name)
    if above:
        yield _beats_length(card["length"])


def _beats_words(floor: Mapping[str, Any], name: str) -> _Bar:
    ahead, interval = floor["ahead"], floor["ahead_interval"]
    if _above(interval, 0):
        how = "better"
    elif ahead > 0:
        how = "not shown to be better"
    else:
        how = "worse" if interval[1] < 0 else "no better"
    words = (
        f"It is {how} than TF-IDF with logistic regression, which has {name} {floor['value']:.2f}: the difference "
        f"is {ahead:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})."
    )
    return _Bar(_above(interval, 0), words)


def _beats_length(length: Mapping[str, Any]) -> _Bar:
    if length["ahead_interval"] is None:
        return _Bar(False, "Length tells it all: no two answers of like length are rated differently.")
    within = f"AUROC {length['auroc_within']:.2f} ({_ends(length['auroc_within_interval'])})"
    if _above(length["ahead_interval"], 0):
        return _Bar(True, f"It reads more than length: among answers of like length it has {within}.")
    correlation = length["correlation"] or 0.0
    if abs(correlation) >= MOSTLY_LENGTH:
        what = f"It only counts length (correlation {correlation:+.2f}, Spearman)"
    else:
        what = "It is not shown to read more than length"
    return _Bar(False, f"{what}: among answers of like length it has {within}.")


def _calibrated(card: Card) -> _Bar:
    calibration = card["calibration"]
    error, chance = calibration["ece_after"], calibration["ece_by_chance"]
    told = f"after scaling its probabilities are off by {error:.3f} on average (ECE"
    if error <= ECE_ALLOWED:
        return _Bar(True, f"Calibrated: {told}; {ECE_ALLOWED} allowed).")
    if error <= chance:
        return _Bar(True, f"Calibrated as far as so few answers tell: {told}; {chance:.3f} may be chance).")
    return _Bar(False, f"Not calibrated: {told}; {ECE_ALLOWED} allowed).")


def _above(interval: tuple[float, float], bar: float) -> bool:
    return interval[0] > bar


def _ends(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"
