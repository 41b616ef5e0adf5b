"""Compares LoRA with full tuning: cost by stage, quality at the end and at matched KL, and a conclusion."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perl.report.numbers import (
    GAP,
    NONE,
    Spread,
    bytes_text,
    count_text,
    decimal,
    flops_text,
    joined,
    percent,
    rate_text,
    seconds_text,
    signed,
    spread,
    spread_text,
)
from perl.report.outcome import Matched
from perl.report.runs import Group
from perl.report.words import STAGE
from perl.results import StageResult

SMALL = 0.005
"""A standard deviation of a cost below this share of its mean is not shown."""
SAME = 0.02
"""Costs that differ by less than this share count as the same."""
STANDARD_ERRORS = 2.0
"""A difference of more than this many standard errors counts as clear."""
COSTS: list[tuple[str, Callable[[StageResult], float | None], Callable[[float], str]]] = [
    ("trainable parameters", lambda stage: stage.trainable_parameters, count_text),
    ("time", lambda stage: stage.seconds, seconds_text),
    ("waited", lambda stage: stage.waited_seconds, seconds_text),
    ("tokens per second", lambda stage: stage.tokens_per_second, rate_text),
    ("peak memory", lambda stage: stage.peak_memory_bytes, bytes_text),
    ("peak RSS", lambda stage: stage.peak_rss_bytes, bytes_text),
    ("compute", lambda stage: stage.flops, flops_text),
    ("useful", lambda stage: stage.useful_flops_share, percent),
]
"""The costs of a stage: name, value and format."""
COMPARED = 5
"""Number of these that are compared between tunings."""
BALANCED = (
    ("peak memory", "Less memory", "More memory", True),
    ("tokens per second", "Slower, in tokens per second", "Faster, in tokens per second", False),
)
"""Cost, its description if LoRA's is lower and if it is higher, and whether lower is better."""
DECISIVE = (
    "Gold judge at matched",
    "Gold judge at the end",
    "Reward at matched",
    "Reward at the end",
    "Reward model",
)
"""Beginnings of metric names; the first one that exists decides the bottom line."""


@dataclass(frozen=True)
class CostRow:
    """A cost of a stage under both tunings."""

    stage: str
    metric: str
    lora: Spread
    full: Spread
    text: Callable[[float], str]

    @property
    def ratio(self) -> float:
        """LoRA's cost as a multiple of full tuning's; NaN if that is 0."""
        return self.lora.mean / self.full.mean if self.full.mean else math.nan

    @property
    def cells(self) -> tuple[str, str, str]:
        """LoRA, full tuning, ratio."""
        ratio = f"×{GAP}{self.ratio:.2f}" if self.ratio >= 0.1 else f"×{GAP}{self.ratio:.2g}"
        return self._cell(self.lora), self._cell(self.full), NONE if math.isnan(self.ratio) else ratio

    def _cell(self, value: Spread) -> str:
        small = value.sd is None or value.sd <= SMALL * abs(value.mean)
        return self.text(value.mean) if small else f"{self.text(value.mean)} ±{GAP}{self.text(value.sd or 0.0)}"


def cost_rows(lora: Group, full: Group) -> list[CostRow]:
    """Return parameters, memory, speed and time of each stage that both tunings have."""
    rows = []
    for name, label in STAGE.items():
        sides = [[stage for run in group.runs if (stage := run.stages.get(name))] for group in (lora, full)]
        for metric, value, text in COSTS[:COMPARED]:
            of_lora, of_full = (spread(value(stage) for stage in stages) for stages in sides)
            if of_lora is not None and of_full is not None:
                rows.append(CostRow(label, metric, of_lora, of_full, text))
    return rows


@dataclass(frozen=True)
class QualityRow:
    """A quality metric under both tunings."""

    metric: str
    lora: Spread
    full: Spread

    @property
    def difference(self) -> float:
        """LoRA minus full tuning."""
        return self.lora.mean - self.full.mean

    @property
    def clear(self) -> bool | None:
        """Whether the difference is more than two standard errors; None if either side has a single run.

        The standard error of the difference is √(sd₁²/n₁ + sd₂²/n₂) (Welch 1947).
        """
        if self.lora.sd is None or self.full.sd is None:
            return None
        error = math.sqrt(self.lora.sd**2 / self.lora.n + self.full.sd**2 / self.full.n)
        return abs(self.difference) > STANDARD_ERRORS * error

    @property
    def cells(self) -> tuple[str, str, str]:
        """LoRA, full tuning, difference."""
        return spread_text(self.lora), spread_text(self.full), signed(self.difference)


def quality_rows(lora: Group, full: Group, matched: Matched | None) -> list[QualityRow]:
    """Return the quality of reward model and policy, at the end and at matched KL."""
    both = (lora, full)
    sides = {
        f"Reward model's {ranked_by(both)}": [spread(card.ranked[0] for card in group.reward) for group in both],
        "Reward at the end": [spread(one.reward_after for one in group.rl) for group in both],
        "Gold judge at the end": [spread(one.gold_after for one in group.rl) for group in both],
        "KL at the end": [spread(one.kl for one in group.rl) for group in both],
    }
    if matched is not None:
        cut = len(lora.runs)
        for name, values in (("Reward", matched.rewards), ("Gold judge", matched.golds)):
            sides[f"{name} at matched KL {matched.kl:.2f}"] = [spread(values[:cut]), spread(values[cut:])]
    return [
        QualityRow(name, of_lora, of_full)
        for name, (of_lora, of_full) in sides.items()
        if of_lora is not None and of_full is not None
    ]


def ranked_by(groups: Sequence[Group]) -> str:
    """Return the metric of these runs' reward models."""
    return next((card.metric for group in groups for card in group.reward), "AUROC")


@dataclass(frozen=True)
class Balance:
    """Sentences on where LoRA is ahead, where it is behind, and what the runs cannot show."""

    ahead: list[str]
    behind: list[str]
    open: list[str]


def balance(costs: Sequence[CostRow], qualities: Sequence[QualityRow]) -> Balance:
    """Return the advantages and disadvantages of LoRA."""
    sides = Balance([], [], [])
    for metric, less, more, less_is_better in BALANCED:
        ratios = [(row.stage, row.ratio) for row in costs if row.metric == metric]
        for words, chosen, good in (
            (less, [one for one in ratios if one[1] < 1 - SAME], less_is_better),
            (more, [one for one in ratios if one[1] > 1 + SAME], not less_is_better),
        ):
            if chosen:
                where = joined([f"{stage} (×{GAP}{ratio:.2f})" for stage, ratio in chosen])
                (sides.ahead if good else sides.behind).append(f"{words}: {where}.")
    for row in (row for row in qualities if not row.metric.startswith("KL")):
        words = f"{row.metric}: {decimal(row.lora.mean)} against {decimal(row.full.mean)}"
        if row.clear:
            (sides.ahead if row.difference > 0 else sides.behind).append(f"{words}.")
        else:
            why = (
                "with a single run this may be chance"
                if row.clear is None
                else "that is within two standard errors"
            )
            sides.open.append(f"{words}; {why}.")
    return sides


def bottom_line(rows: Sequence[QualityRow], label: str) -> str:
    """Return whether full tuning would have been better, by the first metric in `DECISIVE`."""
    best = next((row for start in DECISIVE for row in rows if row.metric.startswith(start)), None)
    if best is None:
        return "These runs have no quality metric under both tunings."
    metric = best.metric[0].lower() + best.metric[1:]
    evidence = f"({metric}: {label} {decimal(best.lora.mean)}, full tuning {decimal(best.full.mean)})"
    if best.clear is None:
        return f"Not known: with a single run, a difference may be chance {evidence}."
    if not best.clear:
        return f"No difference shown: the two are within two standard errors {evidence}."
    return (
        f"Yes, full tuning is better {evidence}." if best.difference < 0 else f"No, {label} is better {evidence}."
    )


def reward_line(by_tuning: Sequence[Group]) -> str:
    """Return one line that compares the reward model under LoRA with the one under full tuning."""
    rows = quality_rows(by_tuning[0], by_tuning[1], None)
    sides = balance([], [row for row in rows if row.metric.startswith("Reward model")])
    for how, lines in (("is ahead of", sides.ahead), ("is behind", sides.behind), ("and", sides.open)):
        if lines:
            return f"{by_tuning[0].label} {how} full tuning. {lines[0]}"
    return f"{by_tuning[0].label} and full tuning cannot be compared: one of them has no {ranked_by(by_tuning)}."


@dataclass(frozen=True)
class Predictions:
    """Estimated and measured memory, one row per tuning, stage and phase, and a summary in one sentence."""

    rows: Sequence[tuple[str, ...]]
    words: str


def predictions(groups: Sequence[Group]) -> Predictions | None:
    """Return the predictions of each group's first run; None if nothing was estimated."""
    peaks = [
        ((group.label, STAGE[name], phase), predicted.peak, measured.peak)
        for group in groups
        for name, stage in group.first.stages.items()
        for phase, predicted in (stage.predicted_memory or {}).items()
        if (measured := stage.memory.get(phase)) and measured.peak
    ]
    if not peaks:
        return None
    errors = {where: predicted / measured - 1 for where, predicted, measured in peaks}
    rows = [(*where, bytes_text(one), bytes_text(other), percent(errors[where], 1)) for where, one, other in peaks]
    worst = max(errors, key=lambda where: abs(errors[where]))
    within = f"within {percent(abs(errors[worst]), 1)} of the measurement everywhere (worst: {', '.join(worst)})"
    return Predictions(rows, f"The memory estimate was {within}.")
