"""What SFT and reward training hand to transformers' Trainer: progress, metrics on disk, and the meter."""

from contextlib import AbstractContextManager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from perl.measure.meter import Meter
from perl.progress import Advance
from perl.rundir import MetricsLog


class Watch(TrainerCallback):
    """Advances the bar, writes a line of metrics a step, and measures every step."""

    def __init__(self, bar: Advance, log: MetricsLog, meter: Meter) -> None:
        self._bar, self._log, self._meter = bar, log, meter
        self._step: AbstractContextManager[object] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure."""
        self._step = self._meter.step(kwargs["optimizer"])
        self._step.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring."""
        assert self._step is not None
        self._step.__exit__(None, None, None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the trainer logged."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # the trainer's closing summary, or an evaluation
            return
        self._log.write(state.global_step, {name: float(value) for name, value in logs.items()})
        self._bar(loss=float(logs["loss"]))
