"""The reward model's card on the page: verdict, figures, slices, plots and mistakes."""

from collections.abc import Callable, Sequence
from typing import Any

from perl.page import words
from perl.page.card_plots import reliability_plot, scores_plot
from perl.page.card_words import fitness
from perl.page.compare import quality_rows
from perl.page.curves import step_plot
from perl.page.numbers import NONE, Spread, decimal, interval_text, percent, spread, spread_text
from perl.page.outcome import Group
from perl.page.schema import Interval, RewardEval
from perl.page.tunings import balance

Figure = Callable[[RewardEval], tuple[float | None, Interval | None]]
SLICE_HEAD = ("By", "Slice", "Answers", "Up", "AUROC", "95 % interval", "ECE, scaled")
MISTAKES = {
    "Bad answers that score high": "downs_scored_high",
    "Good answers that score low": "ups_scored_low",
}


def card(by_tuning: Sequence[Group]) -> dict[str, Any] | None:
    """The card of the first tuning's runs, and the other tuning in a line; None without a reward model."""
    group = by_tuning[0]
    cards = group.reward
    if not cards:
        return None
    rows = [(label, spread_text(value), _told(interval)) for label, value, interval in _rows(cards)]
    plots = [
        reliability_plot(cards[0]),
        scores_plot(cards[0]),
        step_plot(group, "reward", "loss", "Loss in training", "loss"),
    ]
    intervals = any(row[2] != NONE for row in rows)
    found = fitness(cards)
    mistakes = cards[0].mistakes
    return {
        "fitness": found,
        "words": words.card_words(cards) if found else [words.trust_words(cards), *words.card_words(cards)],
        "rows": rows if intervals else [row[:2] for row in rows],
        "intervals": intervals,
        "n": cards[0].n,
        "against": cards[0].against,
        "calibration": cards[0].calibration,
        "floor": cards[0].floor,
        "tunings": tunings_line(by_tuning),
        "slice_head": SLICE_HEAD,
        "slices": _slice_rows(cards[0]),
        "mistakes": [
            (title, getattr(mistakes, kind)) for title, kind in MISTAKES.items() if getattr(mistakes, kind, [])
        ],
        "plots": [plot for plot in plots if plot is not None],
    }


def _rows(cards: Sequence[RewardEval]) -> list[tuple[str, Spread, Interval | None]]:
    """The figures that there are: mean over seeds, and the interval of a single run."""
    figures: list[tuple[str, Figure]] = [
        ("AUROC", lambda card: (card.auroc, _interval(card, "auroc"))),
        ("AUROC against the labels", lambda card: (card.auroc_labels, _interval(card, "auroc_labels"))),
        ("Pairwise accuracy", lambda card: (card.pairwise_accuracy, _interval(card, "pairwise_accuracy"))),
        ("Accuracy", lambda card: (card.accuracy, _interval(card, "accuracy"))),
        ("… of the majority label alone", lambda card: (card.majority_accuracy, None)),
        ("Balanced accuracy", lambda card: (card.balanced_accuracy, _interval(card, "balanced_accuracy"))),
        *_beside(cards[0]),
        *_calibration(cards[0]),
    ]
    rows = []
    for label, figure in figures:
        value = spread(figure(card)[0] for card in cards)
        if value is not None:
            rows.append((label, value, figure(cards[0])[1] if len(cards) == 1 else None))
    return rows


def _beside(first: RewardEval) -> list[tuple[str, Figure]]:
    """Counting words, and counting characters."""
    rows: list[tuple[str, Figure]] = []
    if first.floor is not None:
        name = "AUROC" if first.floor.figure == "auroc" else "Pairwise accuracy"
        rows.append((f"{name} of TF-IDF + logistic regr.", _of_floor("value")))
        rows.append(("… the model is ahead by", _of_floor("ahead")))
    if first.length is not None:
        rows.append(("AUROC of length alone", _of_length("auroc_of_length")))
        rows.append(("… of the model among like lengths", _of_length("auroc_within")))
        rows.append(("Correlation with length (Spearman)", _of_length("correlation")))
    return rows


def _calibration(first: RewardEval) -> list[tuple[str, Figure]]:
    if first.calibration is None:
        return [("Calibration error (ECE)", lambda card: (card.ece, _interval(card, "ece")))]

    def error(name: str) -> Figure:
        return lambda card: (getattr(card.calibration, name, None), None)

    return [
        ("Calibration error (ECE), as it is", error("ece_before")),
        ("… with a temperature", error("ece_temperature")),
        ("… with slope and intercept", error("ece_after")),
    ]


def _interval(card: RewardEval, key: str) -> Interval | None:
    return (card.intervals or {}).get(key)


def _of_floor(name: str) -> Figure:
    return lambda card: (getattr(card.floor, name, None), getattr(card.floor, f"{name}_interval", None))


def _of_length(name: str) -> Figure:
    return lambda card: (getattr(card.length, name, None), getattr(card.length, f"{name}_interval", None))


def _slice_rows(first: RewardEval) -> list[tuple[str, ...]]:
    return [
        (
            one.by,
            one.name,
            f"{one.n:,}",
            percent(one.share_up),
            NONE if one.auroc is None else decimal(one.auroc),
            _told(one.interval),
            NONE if one.ece is None else decimal(one.ece),
        )
        for one in first.slices
    ]


def _told(interval: Interval | None) -> str:
    return NONE if interval is None else interval_text(*interval)


def tunings_line(by_tuning: Sequence[Group]) -> str:
    """LoRA's AUROC beside full tuning's, and whether seeds can tell them apart."""
    if len(by_tuning) > 1:
        lora, full = by_tuning
        rows = [row for row in quality_rows(lora, full, None) if row.figure.startswith("Reward model")]
        sides = balance([], rows)
        for how, lines in (
            ("LoRA is ahead of full tuning", sides.ahead),
            ("LoRA is behind full tuning", sides.behind),
            ("LoRA beside full tuning", sides.open),
        ):
            if lines:
                return f"{how}. {lines[0]}"
    return "LoRA against full tuning: not compared (perl-rlhf compare does)."
