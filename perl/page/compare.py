"""LoRA against full tuning: cost by stage, quality at the end and at matched KL, with the seeds' spread."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perl.page.matched import Matched, curve, match
from perl.page.numbers import GAP, NONE, Spread, bytes_text, count_text, percent, rate_text, seconds_text, spread
from perl.page.outcome import STAGE, Group
from perl.page.runs import Run
from perl.page.schema import PhaseMemory, Stage

SMALL = 0.005
"""A spread of costs below this share of the mean is left out."""
STANDARD_ERRORS = 2.0
"""A difference is called clear beyond so many standard errors."""


@dataclass(frozen=True)
class CostRow:
    """A figure of a stage under both tunings, and LoRA's as a multiple of full tuning's."""

    stage: str
    figure: str
    lora: Spread
    full: Spread
    text: Callable[[float], str]

    @property
    def ratio(self) -> float | None:
        """LoRA over full tuning."""
        return self.lora.mean / self.full.mean if self.full.mean else None

    @property
    def cells(self) -> tuple[str, str, str]:
        """LoRA, full tuning, ratio."""
        if self.ratio is None:
            ratio = NONE
        else:
            ratio = f"×{GAP}{self.ratio:.2f}" if self.ratio >= 0.1 else f"×{GAP}{self.ratio:.2g}"
        return self._cell(self.lora), self._cell(self.full), ratio

    def _cell(self, value: Spread) -> str:
        worth_saying = value.sd is not None and value.sd > SMALL * abs(value.mean)
        return (
            f"{self.text(value.mean)} ±{GAP}{self.text(value.sd or 0.0)}"
            if worth_saying
            else self.text(value.mean)
        )


@dataclass(frozen=True)
class QualityRow:
    """A figure of quality under both tunings."""

    figure: str
    lora: Spread
    full: Spread

    @property
    def difference(self) -> float:
        """LoRA less full tuning."""
        return self.lora.mean - self.full.mean

    @property
    def clear(self) -> bool | None:
        """Whether the difference is more than two standard errors; None with a single run on either side.

        The standard error of the difference is √(sd₁²/n₁ + sd₂²/n₂) (Welch 1947).
        """
        if self.lora.sd is None or self.full.sd is None:
            return None
        error = math.sqrt(self.lora.sd**2 / self.lora.n + self.full.sd**2 / self.full.n)
        return abs(self.difference) > STANDARD_ERRORS * error


def cost_rows(lora: Group, full: Group) -> list[CostRow]:
    """Parameters, memory, speed and time of each stage that both tunings have."""
    rows = []
    figures: list[tuple[str, Callable[[Stage], float | None], Callable[[float], str]]] = [
        ("trainable parameters", lambda stage: stage.trainable_parameters, count_text),
        ("peak memory", lambda stage: stage.peak_memory_bytes, bytes_text),
        ("tokens a second", lambda stage: stage.tokens_per_second, rate_text),
        ("time", lambda stage: stage.seconds, seconds_text),
    ]
    for name, label in STAGE.items():
        for figure, value, text in figures:
            both = [spread(_of(run, name, value) for run in group.runs) for group in (lora, full)]
            if both[0] is not None and both[1] is not None:
                rows.append(CostRow(label, figure, both[0], both[1], text))
    return rows


def _of(run: Run, name: str, value: Callable[[Stage], float | None]) -> float | None:
    stage = run.stages.get(name)
    return None if stage is None else value(stage)


def match_all(groups: Sequence[Group]) -> Matched | None:
    """Reward and gold of all runs at the KL that all of them reached; runs in the groups' order."""
    return match([curve(run.metrics["policy"]) for group in groups for run in group.runs])


def quality_rows(lora: Group, full: Group, matched: Matched | None) -> list[QualityRow]:
    """What the reward model and the policy came to, at the end and at matched KL."""
    ends = [
        [
            ("Reward model's AUROC", spread(card.auroc for card in group.reward)),
            ("Reward at the end", spread(one.reward_after for one in group.rl)),
            ("Gold judge at the end", spread(one.gold_after for one in group.rl)),
            ("KL at the end", spread(one.kl for one in group.rl)),
        ]
        for group in (lora, full)
    ]
    pairs = [(name, one, other) for (name, one), (_, other) in zip(*ends, strict=True)]
    if matched is not None:
        cut = len(lora.runs)
        at = f"at matched KL {matched.kl:.2f}"
        pairs.append((f"Reward {at}", spread(matched.rewards[:cut]), spread(matched.rewards[cut:])))
        pairs.append((f"Gold judge {at}", spread(matched.golds[:cut]), spread(matched.golds[cut:])))
    return [QualityRow(name, one, other) for name, one, other in pairs if one is not None and other is not None]


@dataclass(frozen=True)
class PredictionRow:
    """Memory as estimated before and as measured."""

    tuning: str
    stage: str
    phase: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the estimate was off, as a share of what was measured."""
        return self.predicted / self.measured - 1 if self.measured else 0.0

    @property
    def cells(self) -> tuple[str, str, str]:
        """Predicted, measured, and the error."""
        return bytes_text(self.predicted), bytes_text(self.measured), percent(self.error, 1)


def prediction_rows(groups: Sequence[Group]) -> list[PredictionRow]:
    """The estimate beside the measurement, for each first run's stages and the phases both have."""
    rows = []
    for group in groups:
        for name, stage in group.runs[0].stages.items():
            predicted, measured = stage.predicted_memory or {}, stage.memory or {}
            rows += [
                PredictionRow(group.label, STAGE[name], phase, peak.peak, measured[phase].peak)
                for phase, peak in predicted.items()
                if phase in measured
            ]
            if predicted and not measured and stage.peak_memory_bytes:
                peak = max(_peaks(predicted))
                rows.append(PredictionRow(group.label, STAGE[name], "peak", peak, stage.peak_memory_bytes))
    return rows


def _peaks(memory: dict[str, PhaseMemory]) -> list[float]:
    return [one.peak for one in memory.values()]
