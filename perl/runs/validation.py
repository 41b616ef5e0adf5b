"""Best, not last: what validations found, which step's weights stay, and when to stop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from perl.system.progress import counted


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which weights a stage kept, the best by its validations.

    Attributes:
        step: after which they were those of the training.
        taken, steps: how many it took, and was to take.
        by: what was measured, on how many `rows`.
        values: by step.
    """

    step: int
    taken: int
    steps: int
    by: str
    rows: int
    values: list[tuple[int, float]]

    @property
    def words(self) -> str:
        """Which, and why."""
        text = f"Kept are the weights of step {self.step} of {self.steps}"
        value = dict(self.values).get(self.step)
        if value is None:  # a guard stopped RL, and the best step is later than the trouble's beginning
            return f"{text}, the last from before the trouble, which no validation was of."
        text += f", the best of {counted(len(self.values), 'validation')} by {self.by} ({value:.4g})"
        text += f" on {counted(self.rows, 'row')}"
        return f"{text}; it stopped early, at step {self.taken}." if self.taken < self.steps else f"{text}."


@dataclass
class Validation:
    """The validations of one training so far.

    Attributes:
        every: steps from one to the next; the last step has one too.
        patience: so many without a better one end the training; None: nothing does.
        by: what is measured, for people.
        rows: how many it is measured on.
        sign: 1 where more is better, -1 where less is.
        values: by step.
        unit: what a penalty is measured in, once it is known.
    """

    every: int
    patience: int | None
    by: str
    rows: int
    sign: int
    values: dict[int, float] = field(default_factory=dict)
    unit: float | None = None

    def due(self, step: int, steps: int) -> bool:
        """Whether there is one after so many of all steps."""
        return step % self.every == 0 or step == steps

    def best(self, until: int | None = None) -> int | None:
        """The first step with the best value, none of them later than `until`; None without a finite value."""
        known = [
            (-self.sign * value, step)
            for step, value in self.values.items()
            if math.isfinite(value) and (until is None or step <= until)
        ]
        return min(known)[1] if known else None

    @property
    def exhausted(self) -> bool:
        """Whether the patience has run out."""
        later = sum(step > (self.best() or 0) for step in self.values)
        return self.patience is not None and later >= self.patience

    def state_dict(self) -> dict[str, object]:
        return {"values": list(self.values.items()), "unit": self.unit}

    def load_state_dict(self, state: Mapping[str, Any], steps: int) -> None:
        """Of a run of so many steps; the last validation of a shorter one, which this one has not, is left out."""
        self.values = {step: value for step, value in dict(state["values"]).items() if self.due(step, steps)}
        self.unit = state["unit"]

    def kept(self, step: int, steps: int) -> Kept:
        """For the report: the step whose weights were kept, of so many that were meant."""
        taken = max(self.values)
        return Kept(
            step=step, taken=taken, steps=steps, by=self.by, rows=self.rows, values=list(self.values.items())
        )
