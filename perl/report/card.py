"""The reward model card on the page: its table, slices and worst mistakes."""

from collections.abc import Callable, Sequence

from perl.measure.bootstrap import Interval
from perl.measure.reward_model_card import Mistake, RewardModelCard
from perl.measure.slices import Slice
from perl.report import charts, words
from perl.report.numbers import NONE, decimal, interval_text, percent, spread, spread_text
from perl.report.runs import Group
from perl.report.tunings import reward_line

SHOWN_METRICS = 4
"""Number of metrics shown; the others are collapsed."""
Row = tuple[str, ...]
CARD: list[tuple[str, Callable[[RewardModelCard], tuple[float | None, Interval | None]]]] = [
    ("AUROC", lambda card: (card.auroc, card.intervals.get("auroc"))),
    ("Pairwise accuracy", lambda card: (card.pairwise_accuracy, card.intervals.get("pairwise_accuracy"))),
    ("Accuracy", lambda card: (card.accuracy, card.intervals.get("accuracy"))),
    ("… of the majority label alone", lambda card: (card.majority_accuracy, None)),
    ("AUROC against the labels", lambda card: (card.auroc_labels, card.intervals.get("auroc_labels"))),
    ("Balanced accuracy", lambda card: (card.balanced_accuracy, card.intervals.get("balanced_accuracy"))),
    ("TF-IDF + logistic regression", lambda card: (card.tfidf_baseline.value, card.tfidf_baseline.value_interval)),
    ("… the model is ahead by", lambda card: (card.tfidf_baseline.ahead, card.tfidf_baseline.ahead_interval)),
    ("AUROC of length alone", lambda card: (card.length.auroc_of_length, None)),
    (
        "… of the model among similar lengths",
        lambda card: (card.length.auroc_within, card.length.auroc_within_interval),
    ),
    ("Correlation with length (Spearman)", lambda card: (card.length.correlation, None)),
    ("Calibration error (ECE), unscaled", lambda card: (card.calibration.ece_before, None)),
    ("… with a temperature", lambda card: (card.calibration.ece_temperature, None)),
    ("… with slope and intercept", lambda card: (card.calibration.ece_after, None)),
]
"""Label, and a function that returns value and interval."""
OF_RATINGS = ("AUROC", "Accuracy", "… of the majority label alone", "Balanced accuracy")
"""Not shown for pairs, for which every other AUROC is a pairwise accuracy."""


def card(by_tuning: Sequence[Group]) -> dict[str, object]:
    """Return the reward model card of the first tuning's runs, with one line on the other tuning."""
    group = by_tuning[0]
    cards, first = group.reward, group.reward[0]
    rows = []
    for label, estimate in CARD:
        value, interval = spread(estimate(card)[0] for card in cards), estimate(first)[1]
        if value is not None and not (first.compared and label in OF_RATINGS):
            words_of = label.replace("AUROC", "Pairwise accuracy") if first.compared else label
            rows.append((words_of, spread_text(value), interval_text(interval if len(cards) == 1 else None)))
    plots = [
        charts.reliability_plot(first),
        charts.scores_plot(first),
        charts.step_plot(group, "reward", "loss", "Loss in training", "loss"),
    ]
    return {
        **folded(["Metric", "Value", "95 % interval"], rows),
        "fitness": words.fitness(cards),
        "words": words.reward_model_words(cards) + ([reward_line(by_tuning)] if by_tuning[1:] else []),
        "first": first,
        "slices": _slices(first),
        "mistakes": _mistakes(first),
        "plots": [plot for plot in plots if plot is not None],
    }


def _slices(card: RewardModelCard) -> dict[str, object]:
    """Return the head and the rows of the table; pairs have no share of ups and no ECE."""
    head = ["By", "Slice", "Answers", "Up", "AUROC", "95 % interval", "ECE, scaled"]
    rows = [_slice_row(one) for one in card.slices]
    if not card.compared:
        return {"head": head, "rows": rows}
    kept = [(by, name, n, ranked, interval) for by, name, n, _, ranked, interval, _ in rows]
    return {"head": ["By", "Slice", "Pairs", "Pairwise accuracy", "95 % interval"], "rows": kept}


def _slice_row(one: Slice) -> tuple[str, str, str, str, str, str, str]:
    ranked, ece = (NONE if value is None else decimal(value) for value in (one.auroc, one.ece))
    up = NONE if one.share_up is None else percent(one.share_up)
    return one.by, one.name, f"{one.n:,}", up, ranked, interval_text(one.interval), ece


def _mistakes(card: RewardModelCard) -> list[tuple[str, list[Mistake]]]:
    titles = "Bad answers with high scores", "Good answers with low scores"
    if card.compared:
        titles = "Worse answers that score higher than the better one", "The better answers, in the same order"
    return [(titles[0], card.mistakes.downs_scored_high), (titles[1], card.mistakes.ups_scored_low)]


def folded(head: list[str], rows: Sequence[Row], shown: int = SHOWN_METRICS) -> dict[str, object]:
    """Return a table without its last column if that is empty; rows after the first `shown` are collapsed."""
    width = len(head) if any(row[-1] != NONE for row in rows) else len(head) - 1
    cut = [row[:width] for row in rows]
    return {"head": head[:width], "rows": cut[:shown], "further": cut[shown:]}
