"""The Trainer that SFT and reward training share, with its own checkpoints and support for several processes.

transformers' checkpoints are pickles, and its row order depends on earlier random draws. Here the state is
safetensors and JSON, and the order depends only on the seed and the epoch.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from perl.errors import UserError
from perl.parallel.processes import Processes
from perl.private.trainer import HookedTrainer, LengthGroupedSampler
from perl.rl.checks.alarms import WORDS
from perl.rl.checks.guard_state import Limits
from perl.runs import snapshot
from perl.runs.validation import Kept
from perl.stages.adamw import exact_on_average
from perl.stages.training_run import TrainingRun
from perl.stages.ulmfit import GradualUnfreezing, layers_of, slanted_triangular
from perl.system.progress import console
from perl.system.seeds import derived_seed

SHARE = "share"
"""Key in a batch: its share of the rows of all processes; 0 if its row does not count."""


class NotFiniteError(UserError):
    """Error for losses or gradients that are not finite, with which training cannot continue."""

    status = 1


class StepCallback(TrainerCallback):
    """Measures and logs the Trainer's steps, refuses updates that are not finite, and stops on request."""

    def __init__(self, run: TrainingRun, validate: Callable[[], float]) -> None:
        self._run, self._validate = run, validate
        self._measured: dict[str, float] = {}
        self._refused = 0
        self._step: AbstractContextManager[object] = contextlib.nullcontext()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = self._run.meter.step(kwargs["optimizer"])
        self._step.__enter__()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse an update whose gradient is not finite, by removing the gradients.

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
                f"the loss or its gradient was not finite in {self._refused} consecutive steps, up to step "
                f"{step}; these updates were not applied",
                where=f"stage of {learner}",
                remedy="Lower its learning_rate; with base.dtype float16 use bfloat16 or float32.",
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop measuring; validate if it is due; save and stop on request, or if validation stops improving."""
        self._step.__exit__(None, None, None)
        validation, step = self._run.validation, state.global_step
        self._measured = {}
        if validation is not None and validation.due(step, self._run.steps):
            validation.values[step] = self._run.processes.broadcast(self._validate())
            self._measured["validation_loss"] = validation.values[step]
            control.should_save = control.should_save or validation.best() == step
        if self._run.stop.poll() or (validation is not None and validation.exhausted):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # the trainer's final summary, or an evaluation
            return
        refused = {"refused": 1.0} if self._refused else {}
        metrics = {name: self._reduced(name, float(value)) for name, value in logs.items()}
        self._run.log.write(state.global_step, metrics | refused | self._measured)
        self._run.bar(loss=float(logs["loss"]))

    def _reduced(self, name: str, value: float) -> float:
        """Reduce a metric over all processes, unless the Trainer's value is already global."""
        processes = self._run.processes
        if name in ("loss", "grad_norm", "learning_rate", "epoch"):
            return value
        return processes.all_reduce_sum(value) / (1 if name == "num_tokens" else processes.count)


class ShardedCollator:
    """Collates this process's share of the rows of all processes, so that each Trainer works as if alone."""

    def __init__(self, collate: Callable[..., Any], processes: Processes) -> None:
        self._collate, self._processes = collate, processes

    def __call__(self, examples: list[Any]) -> Any:
        """Collate every n-th row, for n processes; an empty share is filled with one row that does not count."""
        share = examples[self._processes.rank :: self._processes.count]
        batch = self._collate(share or examples[:1])
        batch[SHARE] = torch.tensor(len(share) / len(examples))
        return batch


class SeededSampler(LengthGroupedSampler):
    """Groups rows of similar length, in an order that depends only on the seed and the epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(derived_seed(self._seed, "order", self._epoch()))
        return iter(super().__iter__())


class ResumableTrainer(HookedTrainer):
    """A Trainer whose resumed training ends with the same bytes, with one process or several.

    It works as if there were one process: `ShardedCollator` gives it its share of each batch, the loss of that
    share is divided by the whole batch's size, and gradients and losses are summed over the processes before it
    reads them.
    """

    data_collator: Any

    def __init__(self, run: TrainingRun, **arguments: Any) -> None:
        self.run = run
        self._full = run.session.recipe.full_tuning
        unfreezing = [GradualUnfreezing(self._layers, run)] if self._full.gradual_unfreezing else []
        super().__init__(**arguments, callbacks=[*unfreezing, StepCallback(run, self._validated)])
        self.remove_callback(PrinterCallback)

    def validation_loss(self) -> float:
        """Return the mean loss of the validation rows."""
        raise NotImplementedError

    def _validated(self) -> float:
        loss = self.validation_loss()
        self.model.train()
        return loss

    @cached_property
    def _layers(self) -> list[list[nn.Parameter]]:
        return layers_of(self.run.session.roles, self.run.learner)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do the Trainer's step, for the batch of all processes."""
        loss: Tensor = super().training_step(*args, **kwargs)
        processes = self.run.processes
        processes.all_reduce_gradients(self.run.parameters)
        if processes.count == 1:
            return loss
        return torch.tensor(processes.all_reduce_sum(float(loss)), device=loss.device)

    def get_train_dataloader(self) -> Any:
        """Return a loader over the batches of all processes, which collates this process's share."""
        collator = self.data_collator
        self.data_collator = ShardedCollator(collator, self.run.processes)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer in the engine's form; every process starts with the same weights."""
        self.run.session.begin_together(self.run.parameters)
        optimizer = super().create_optimizer(*args, **kwargs)
        by_rate = self.run.session.roles.by_learning_rate(self.run.learner)
        if self._full.layer_decay != 1.0:
            by_rate = {self._full.layer_decay**-depth: layer for depth, layer in enumerate(self._layers)}
        for ratio, weights in by_rate.items():
            if ratio != 1.0:
                scale_learning_rate(optimizer, weights, ratio)
        self.optimizer = self.run.session.engine.optimizer(exact_on_average(optimizer))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the Trainer's scheduler, or that of `perl.stages.ulmfit`."""
        if self._full.schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        of_step = partial(slanted_triangular, steps=num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, of_step)
        return self.lr_scheduler

    def resume(self) -> None:
        """Train from the newest checkpoint, or from the start, and load the weights with the best validation.

        Raises:
            KeyboardInterrupt: a stop was requested; the state is saved.
        """
        run = self.run
        if run.validation is None or not run.validation.exhausted:
            self._train()
        if run.stop.poll():  # again: the last poll may have been before the last step's checkpoint
            raise KeyboardInterrupt
        if run.validation is not None and (best := run.validation.best()) is not None:
            tensors = run.checkpoints.read(best).tensors
            snapshot.load_trained_state(run.session.roles, [run.learner], tensors, str(run.checkpoints.folder))

    @property
    def kept(self) -> Kept | None:
        """Which weights were kept, if validation chose them."""
        validation = self.run.validation
        if validation is None:
            return None
        return validation.kept(validation.best() or max(validation.values), self.run.steps)

    def _train(self) -> None:
        folder = self.run.scratch / "resumed"
        if self.run.resumed is not None:  # the Trainer reads only its own state here; `load_state` loads the rest
            folder.mkdir()
            state = json.dumps(self.run.resumed.values["trainer"])
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
        self.train(resume_from_checkpoint=str(folder) if self.run.resumed is not None else None)

    def train_sampler(self, lengths: Sequence[int]) -> SeededSampler:
        """Return a sampler with the same order in all processes and after a restart."""
        seed, batch_size = self.run.seed, self.args.train_batch_size
        return SeededSampler(lengths, batch_size, seed, lambda: int(self.state.epoch or 0))

    def save_state(self) -> None:
        run, file = self.run, self.run.scratch / "trainer_state.json"
        self.state.log_history = []  # it is in metrics.jsonl
        self.state.save_to_json(str(file))
        optimizer = snapshot.unwrapped(self.optimizer)
        state = snapshot.take(self.state.global_step, run.session.roles, [run.learner], optimizer)
        state.values["trainer"] = json.loads(file.read_text(encoding="utf-8"))
        state.values["schedule"] = self.lr_scheduler.state_dict()
        state.values["meter"] = run.meter.times()
        if run.validation is not None:
            state.values["validation"] = run.validation.state_dict()
        run.checkpoints.write(state, keep=run.validation.worth_keeping() if run.validation is not None else ())

    def load_state(self) -> None:
        if (state := self.run.resumed) is not None:
            run, optimizer = self.run, snapshot.unwrapped(self.optimizer)
            snapshot.restore(run.session.roles, [run.learner], optimizer, state, str(run.checkpoints.folder))
            self.lr_scheduler.load_state_dict(state.values["schedule"])

    def load_generators(self) -> None:
        if (state := self.run.resumed) is not None:
            snapshot.set_generators(state, self.run.processes)


def scale_learning_rate(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], ratio: float) -> None:
    """Move weights to separate parameter groups, whose learning rate is multiplied by a ratio."""
    chosen = {id(weight) for weight in weights}
    for group in list(optimizer.param_groups):
        apart = [weight for weight in group["params"] if id(weight) in chosen]
        if apart:
            group["params"] = [weight for weight in group["params"] if id(weight) not in chosen]
            optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * ratio})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
