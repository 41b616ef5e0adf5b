"""What is done between the steps of transformers' Trainer: measuring, logging, refusing, stopping."""

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from perl.errors import UserError
from perl.rl.checks.alarms import WORDS
from perl.rl.checks.guard_state import Limits
from perl.stages.training_run import TrainingRun
from perl.system.progress import console


class NotFiniteError(UserError):
    """Training cannot go on with these numbers; the recipe could not have told."""

    status = 1


class StepCallback(TrainerCallback):
    """Measures and logs every step, refuses updates that are not finite, and stops on request."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._refused = 0
        self._step: AbstractContextManager[object] = contextlib.nullcontext()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure."""
        self._step = self._run.meter.step(kwargs["optimizer"])
        self._step.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse an update whose gradient is not finite: an optimizer without gradients changes nothing.

        Raises:
            NotFiniteError: it is the third in a row.
        """
        gradients = [one.grad for group in kwargs["optimizer"].param_groups for one in group["params"]]
        norm = torch.nn.utils.get_total_norm([one for one in gradients if one is not None])
        self._refused = 0 if math.isfinite(norm) else self._refused + 1
        if not self._refused:
            return
        kwargs["optimizer"].zero_grad(set_to_none=True)
        learner, step = self._run.learner, state.global_step + 1
        console.print(f"[yellow]Step {step}[/] of {learner}: {WORDS['not_finite'].what}.")
        if self._refused == Limits.refused:
            raise NotFiniteError(
                f"the loss or its gradient was not finite {self._refused} steps in a row, up to step {step}; none "
                "of these updates was made",
                where=f"stage of {learner}",
                remedy="Lower its learning_rate; with base.dtype float16 use bfloat16 or float32.",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring; save and stop if that was requested."""
        self._step.__exit__(None, None, None)
        if self._run.stop.poll():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the Trainer logged."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # the trainer's closing summary, or an evaluation
            return
        refused = {"refused": 1.0} if self._refused else {}
        metrics = {name: self._reduced(name, float(value)) for name, value in logs.items()}
        self._run.log.write(state.global_step, metrics | refused)
        self._run.bar(loss=float(logs["loss"]))

    def _reduced(self, name: str, value: float) -> float:
        """A metric of all processes. What is not of the whole batch already is a count, or a mean over a share."""
        processes = self._run.processes
        if name in ("loss", "grad_norm", "learning_rate", "epoch"):
            return value
        return processes.all_reduce_sum(value) / (1 if name == "num_tokens" else processes.count)
