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
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from perl.checkpoint import Checkpoints, State
from perl.errors import UserError
from perl.interrupt import Leaving, between_steps
from perl.measure.meter import Meter
from perl.model.roles import Role, Roles
from perl.progress import Advance, console, track
from perl.recipe import StageName
from perl.rl.alarms import WORDS
from perl.rl.guards import Limits
from perl.rundir import STAGE_ROLE, MetricsLog
from perl.stages import snapshot
from perl.stages.session import Session, derived_seed


@dataclass(frozen=True)
class Course:
    """One stage's training: what it learns, where its figures and its state go."""

    seed: int
    roles: Roles
    learner: Role
    checkpoints: Checkpoints
    found: State | None
    """Where an earlier process stopped; None: at the start."""
    meter: Meter
    log: MetricsLog
    bar: Advance
    leaving: Leaving
    scratch: Path


@contextlib.contextmanager
def course(session: Session, stage: StageName, steps: int) -> Iterator[Course]:
    """Open everything that the training of a stage writes; the stage has all its roles by now.

    Args:
        steps: optimizer steps in all.
    """
    meter = session.meter()
    checkpoints = session.checkpoints(stage)
    found = checkpoints.newest()
    done = found.step if found is not None else 0
    if found is not None:
        meter.go_on_from(found.values["meter"])
    with (
        session.folder.metrics(stage, done) as log,
        tempfile.TemporaryDirectory() as scratch,
        track(stage, steps, done) as bar,
        session.roles.checkpointed(session.recipe.checkpoint_activations),
        between_steps() as leaving,
    ):
        yield Course(
            seed=session.recipe.seed,
            roles=session.roles,
            learner=STAGE_ROLE[stage],
            checkpoints=checkpoints,
            found=found,
            meter=meter,
            log=log,
            bar=bar,
            leaving=leaving,
            scratch=Path(scratch),
        )


class ResumableTrainer(Trainer):
    """A Trainer that goes on where an earlier process stopped, to the same bytes."""

    course: Course

    def go_on(self) -> None:
        """Train from the newest checkpoint, or from the start.

        Raises:
            KeyboardInterrupt: someone asked to leave; all is saved.
        """
        found, start = self.course.found, None
        if found is not None:
            # The trainer wants its own state in a folder; all else is read below, from ours.
            start = self.course.scratch / "found"
            start.mkdir()
            (start / "trainer_state.json").write_text(json.dumps(found.values["trainer"]), encoding="utf-8")
        self.train(resume_from_checkpoint=str(start) if start is not None else None)
        if self.course.leaving.wanted:
            raise KeyboardInterrupt

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        return _Order(
            rows["length"], self.args.train_batch_size, self.course.seed, lambda: int(self.state.epoch or 0)
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        course, file = self.course, self.course.scratch / "trainer_state.json"
        self.state.log_history = []  # it is in metrics.jsonl
        self.state.save_to_json(str(file))
        tensors, values = snapshot.take(course.roles, [course.learner], self._inner_optimizer())
        values["trainer"] = json.loads(file.read_text(encoding="utf-8"))
        values["schedule"] = self.lr_scheduler.state_dict()
        values["meter"] = course.meter.times()
        course.checkpoints.write(State(self.state.global_step, tensors, values))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights come back together with the optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        course = self.course
        if course.found is None:
            return
        tensors, values = course.found.tensors, course.found.values
        where = str(course.checkpoints.folder)
        snapshot.restore(course.roles, [course.learner], self._inner_optimizer(), (tensors, values), where)
        self.lr_scheduler.load_state_dict(values["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.course.found is not None:
            snapshot.set_generators((self.course.found.tensors, self.course.found.values))

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

    def __init__(self, course: Course) -> None:
        self._course = course
        self._refused = 0
        self._step: AbstractContextManager[object] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure."""
        self._step = self._course.meter.step(kwargs["optimizer"])
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
        learner, step = self._course.learner, state.global_step + 1
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
        if self._course.leaving.wanted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the trainer logged."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # the trainer's closing summary, or an evaluation
            return
        refused = {"refused": 1.0} if self._refused else {}
        self._course.log.write(state.global_step, {name: float(value) for name, value in logs.items()} | refused)
        self._course.bar(loss=float(logs["loss"]))
