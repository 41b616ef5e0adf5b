"""LoRA against full tuning in sentences: what it saves, where it loses."""

from collections.abc import Sequence
from dataclasses import dataclass

from perl.page.compare import CostRow, PredictionRow, QualityRow
from perl.page.numbers import GAP, decimal, joined, percent
from perl.page.outcome import Group

SAME = 0.02
"""Costs within this share of one another are called the same."""
COSTS = (
    ("peak memory", "Less memory", "More memory", True),
    ("tokens a second", "Slower, by tokens a second", "Faster, by tokens a second", False),
)
"""Figure, how to call it where LoRA's is less and where it is more, and whether less is better."""


@dataclass(frozen=True)
class Balance:
    """Sentences on where LoRA is ahead, where it is behind, and what cannot be told."""

    ahead: list[str]
    behind: list[str]
    open: list[str]


def balance(costs: Sequence[CostRow], qualities: Sequence[QualityRow]) -> Balance:
    """Gains and losses of LoRA, as plainly the one as the other."""
    sides = Balance([], [], [])
    for figure, below, above, less_is_better in COSTS:
        chosen = [(row.stage, row.ratio) for row in costs if row.figure == figure and row.ratio is not None]
        for words, picked, good in (
            (below, [one for one in chosen if one[1] < 1 - SAME], less_is_better),
            (above, [one for one in chosen if one[1] > 1 + SAME], not less_is_better),
        ):
            if picked:
                where = joined([f"{stage} (×{GAP}{ratio:.2f})" for stage, ratio in picked])
                (sides.ahead if good else sides.behind).append(f"{words}: {where}.")
    for row in qualities:
        if not row.figure.startswith("KL"):
            _place(row, sides)
    return sides


def _place(row: QualityRow, sides: Balance) -> None:
    words = f"{row.figure}: {decimal(row.lora.mean)} against {decimal(row.full.mean)}"
    if row.clear is None:
        sides.open.append(f"{words}; with one run on a side this may be chance.")
    elif not row.clear:
        sides.open.append(f"{words}; that is within two standard errors.")
    else:
        (sides.ahead if row.difference > 0 else sides.behind).append(f"{words}.")


def bottom_line(rows: Sequence[QualityRow]) -> str:
    """Would full tuning have been better? By gold at matched KL if there is one, else by what there is."""
    order = (
        "Gold judge at matched",
        "Gold judge at the end",
        "Reward at matched",
        "Reward at the end",
        "Reward model",
    )
    best = next((row for start in order for row in rows if row.figure.startswith(start)), None)
    if best is None:
        return "These runs hold no figure of quality under both tunings."
    if best.clear is None:
        return f"Not known: with one run on a side, a difference may be chance ({_told(best)})."
    if not best.clear:
        return f"No difference shown: the two are within two standard errors ({_told(best)})."
    if best.difference < 0:
        return f"Yes, full tuning is better ({_told(best)})."
    return f"No, LoRA is better ({_told(best)})."


def _told(row: QualityRow) -> str:
    figure = row.figure[0].lower() + row.figure[1:]
    return f"{figure}: LoRA {decimal(row.lora.mean)}, full tuning {decimal(row.full.mean)}"


def other_tuning(group: Group) -> str:
    """What is missing where only one tuning was run."""
    this, other = ("LoRA", "full tuning") if group.tuning == "lora" else ("full tuning", "LoRA")
    return (
        f"Not known from this page: only {this} was run. To measure {other} as well, with the same data and seeds:"
    )


def prediction_words(rows: Sequence[PredictionRow]) -> str:
    """How good the estimate of memory was; empty if there was none."""
    if not rows:
        return ""
    worst = max(rows, key=lambda row: abs(row.error))
    return (
        f"The estimate of memory was within {percent(abs(worst.error), 1)} of the measurement everywhere "
        f"(worst: {worst.tuning}, {worst.stage}, {worst.phase})."
    )
