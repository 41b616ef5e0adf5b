"""What SFT and reward training share: transformers' Trainer, watched, and going on from checkpoints of ours.

The Trainer's own checkpoints are pickles, and its order of rows depends on what was drawn before. Here the state
is safetensors and JSON, and the order follows from the seed and the epoch alone.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from perl.errors import UserError
from perl.measure.meter import Meter
from perl.parallel.processes import Processes
from perl.recipe import StageName
from perl.rl.checks.alarms import WORDS
from perl.rl.checks.guard_state import Limits
from perl.roles.roles import Role, Roles
from perl.runs import snapshot
from perl.runs.checkpoint import Checkpoints, State
from perl.runs.folder import STAGE_ROLE, MetricsLog
from perl.stages.session import Session
from perl.system.interrupt import StopRequest, between_steps
from perl.system.progress import Advance, console, track
from perl.system.seeds import derived_seed

SHARE = "share"
"""In a batch: its share of the rows that all processes have; 0 where its row does not count."""


@dataclass(frozen=True)
class TrainingRun:
    """One stage's training: what it learns, where its metrics and its state go."""

    seed: int
    session: Session
    learner: Role
    checkpoints: Checkpoints
    found: State | None
    """Where an earlier process stopped; None: at the start."""
    meter: Meter
    log: MetricsLog
    bar: Advance
    stop: StopRequest
    scratch: Path

    @property
    def roles(self) -> Roles:
        """All roles of the session."""
        return self.session.roles

    @property
    def processes(self) -> Processes:
        """Who trains together."""
        return self.session.processes

    @property
    def learning(self) -> list[nn.Parameter]:
        """What is trained."""
        return self.roles.parameters_of(self.learner)


@contextlib.contextmanager
def training_run(session: Session, stage: StageName, steps: int) -> Iterator[TrainingRun]:
    """Open everything that the training of a stage writes; the stage has all its roles by now.

    Args:
        steps: optimizer steps in all.
    """
    meter = session.meter()
    checkpoints = session.checkpoints(stage)
    found = checkpoints.newest()
    done = found.step if found is not None else 0
    if found is not None:
        meter.resume_from(found.values["meter"])
    with (
        session.folder.metrics(stage, done) as log,
        tempfile.TemporaryDirectory() as scratch,
        track(stage, steps, done) as bar,
        session.roles.checkpointed(session.recipe.checkpoint_activations),
        between_steps(session.processes) as stop,
    ):
        yield TrainingRun(
            seed=session.recipe.seed,
            session=session,
            learner=STAGE_ROLE[stage],
            checkpoints=checkpoints,
            found=found,
            meter=meter,
            log=log,
            bar=bar,
            stop=stop,
            scratch=Path(scratch),
        )


class Dealt:
    """A collator that is given the rows of all processes and collates this one's share of them.

    So the Trainer of each process works as if alone, on the same batches in the same order as a process alone.

    Args:
        collate: for the rows of a share.
    """

    def __init__(self, collate: Callable[..., Any], processes: Processes) -> None:
        self._collate, self._processes = collate, processes

    def __call__(self, examples: list[Any]) -> Any:
        """A batch of every so manieth row; a share of none has one that does not count."""
        mine = examples[self._processes.rank :: self._processes.count]
        batch = self._collate(mine or examples[:1])
        batch[SHARE] = torch.tensor(len(mine) / len(examples))
        return batch


class ResumableTrainer(Trainer):
    """A Trainer that goes on where an earlier process stopped, to the same bytes; and one of several processes.

    It sees one process only: `Dealt` gives it its share of each batch, the loss is of that share over the whole
    batch's size, and gradients and losses are added up before it looks at them.
    """

    run: TrainingRun
    data_collator: Any

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, for the batch of all processes."""
        loss: Tensor = super().training_step(*args, **kwargs)
        processes = self.run.processes
        processes.all_reduce_gradients(self.run.learning)
        return (
            loss
            if processes.count == 1
            else torch.tensor(processes.all_reduce_sum(float(loss)), device=loss.device)
        )

    def get_train_dataloader(self) -> Any:
        """The batches of all processes, of which this one collates its share."""
        whole = self.data_collator
        self.data_collator = Dealt(whole, self.run.processes)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, in the engine's form; every process begins with the same weights."""
        self.run.session.begin_together(self.run.learning)
        plain = super().create_optimizer(*args, **kwargs)
        self.optimizer = self.run.session.engine.optimizer(plain)
        return self.optimizer

    def resume(self) -> None:
        """Train from the newest checkpoint, or from the start.

        Raises:
            KeyboardInterrupt: someone asked to leave; all is saved.
        """
        found, start = self.run.found, None
        if found is not None:
            # The trainer wants its own state in a folder; all else is read below, from ours.
            start = self.run.scratch / "found"
            start.mkdir()
            (start / "trainer_state.json").write_text(json.dumps(found.values["trainer"]), encoding="utf-8")
        self.train(resume_from_checkpoint=str(start) if start is not None else None)
        if self.run.stop.requested:
            raise KeyboardInterrupt

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        return _Order(
            rows["length"], self.args.train_batch_size, self.run.seed, lambda: int(self.state.epoch or 0)
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, file = self.run, self.run.scratch / "trainer_state.json"
        self.state.log_history = []  # it is in metrics.jsonl
        self.state.save_to_json(str(file))
        tensors, values = snapshot.take(run.roles, [run.learner], self._inner_optimizer())
        values["trainer"] = json.loads(file.read_text(encoding="utf-8"))
        values["schedule"] = self.lr_scheduler.state_dict()
        values["meter"] = run.meter.times()
        run.checkpoints.write(State(self.state.global_step, tensors, values))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights come back together with the optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        run = self.run
        if run.found is None:
            return
        tensors, values = run.found.tensors, run.found.values
        where = str(run.checkpoints.folder)
        snapshot.restore(run.roles, [run.learner], self._inner_optimizer(), (tensors, values), where)
        self.lr_scheduler.load_state_dict(values["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.run.found is not None:
            state = self.run.found.tensors, self.run.found.values
            snapshot.set_generators(state, self.run.processes)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return snapshot.unwrapped(self.optimizer)


class _Order(LengthGroupedSampler):
    """Rows of like length together; the order follows from the seed and the epoch, whatever was drawn before."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(derived_seed(self._seed, "order", self._epoch()))
        return iter(super().__iter__())


class NotFiniteError(UserError):
    """Training cannot go on with these numbers; the recipe could not have told."""

    status = 1


class Watch(TrainerCallback):
    """Writes and measures every step, refuses updates that are not finite, and leaves when asked to."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._refused = 0
        self._step: AbstractContextManager[object] | None = None

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
        weights = [weight for group in kwargs["optimizer"].param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        finite = math.isfinite(torch.nn.utils.get_total_norm(gradients))
        self._refused = 0 if finite else self._refused + 1
        if finite:
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
        """Stop measuring; save and stop if someone wants to leave."""
        assert self._step is not None
        self._step.__exit__(None, None, None)
        if self._run.stop.poll():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the trainer logged."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # the trainer's closing summary, or an evaluation
            return
        refused = {"refused": 1.0} if self._refused else {}
        metrics = {name: self._of_all(name, float(value)) for name, value in logs.items()}
        self._run.log.write(state.global_step, metrics | refused)
        self._run.bar(loss=float(logs["loss"]))

    def _of_all(self, name: str, value: float) -> float:
        """A figure of all processes. What is not of the whole batch already is a count, or a mean over a share."""
        processes = self._run.processes
        if name in ("loss", "grad_norm", "learning_rate", "epoch"):
            return value
        return processes.all_reduce_sum(value) / (1 if name == "num_tokens" else processes.count)
