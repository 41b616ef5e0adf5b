"""Validation during training: its values, the best step, and early stopping."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from perl.system.progress import counted


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which weights a stage kept: those with the best validation.

    Attributes:
        step: the step after which the weights were these.
        taken, steps: number of steps taken, and number planned.
        by, rows: what was measured, and on how many rows.
        values: the validation values by step.
    """

    step: int
    taken: int
    steps: int
    by: str
    rows: int
    values: list[tuple[int, float]]

    @property
    def words(self) -> str:
        """Which weights were kept, and why."""
        text = f"The kept weights are those of step {self.step} of {self.steps}"
        value = dict(self.values).get(self.step)
        if value is None:  # a guard stopped RL, and the best step is later than the beginning of the trouble
            return f"{text}, the last checkpoint before the trouble, for which there is no validation."
        text += f", the best of {counted(len(self.values), 'validation')} by {self.by} ({value:.4g})"
        text += f" on {counted(self.rows, 'row')}"
        return f"{text}; it stopped early, at step {self.taken}." if self.taken < self.steps else f"{text}."


@dataclass
class Validation:
    """The validations of one training so far.

    Attributes:
        every: steps between validations; the last step has one too.
        patience: validations without improvement after which training stops; None: never.
        by: name of what is measured, for messages.
        rows: number of rows that it is measured on.
        sign: 1 if higher is better, -1 if lower is better.
        values: the validation values by step.
        unit: the unit of a penalty, once it is known.
    """

    every: int
    patience: int | None
    by: str
    rows: int
    sign: int
    values: dict[int, float] = field(default_factory=dict)
    unit: float | None = None

    def due(self, step: int, steps: int) -> bool:
        """Return whether there is a validation after this step of `steps`."""
        return step % self.every == 0 or step == steps

    def best(self, until: int | None = None) -> int | None:
        """Return the first step with the best value, at most `until`; None without a finite value."""
        known = [
            (-self.sign * value, step)
            for step, value in self.values.items()
            if math.isfinite(value) and (until is None or step <= until)
        ]
        return min(known)[1] if known else None

    def worth_keeping(self) -> set[int]:
        """Return the steps whose weights may be needed: the best, and the best of a longer run.

        A longer run that continues this one does not have the extra validation after the last step.
        """
        regular = replace(self, values={step: one for step, one in self.values.items() if step % self.every == 0})
        return {step for step in (self.best(), regular.best()) if step is not None}

    @property
    def exhausted(self) -> bool:
        """Whether the patience has run out."""
        later = sum(step > (self.best() or 0) for step in self.values)
        return self.patience is not None and later >= self.patience

    def state_dict(self) -> dict[str, object]:
        return {"values": list(self.values.items()), "unit": self.unit}

    def load_state_dict(self, state: Mapping[str, Any], steps: int) -> None:
        """Load the state for a run of `steps` steps, without a shorter run's extra validation at its last step."""
        self.values = {step: value for step, value in dict(state["values"]).items() if self.due(step, steps)}
        self.unit = state["unit"]

    def kept(self, step: int, steps: int, stopped_at: int | None = None) -> Kept:
        """Return a description, for the report, of the step whose weights were kept, of `steps` planned.

        Args:
            stopped_at: the step at which something else than validation ended the training.
        """
        taken, values = stopped_at or max(self.values), list(self.values.items())
        return Kept(step=step, taken=taken, steps=steps, by=self.by, rows=self.rows, values=values)
