"""One stage's training on transformers' Trainer: what it trains, for how long, and where its state goes."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from perl.measure.meter import Meter
from perl.parallel.processes import Processes
from perl.recipe import StageName, Supervised
from perl.roles.roles import Role
from perl.runs.checkpoint import Checkpoints, State
from perl.runs.folder import STAGE_ROLE, MetricsLog
from perl.stages.session import Session
from perl.system.interrupt import StopRequest, between_steps
from perl.system.progress import Advance, track


@dataclass(frozen=True)
class TrainingRun:
    """One stage's training."""

    session: Session
    learner: Role
    steps: int
    """Optimizer steps in all."""
    epochs: int
    """Passes over the rows that they are."""
    checkpoints: Checkpoints
    resumed: State | None
    """Where an earlier process stopped; None: at the start."""
    meter: Meter
    log: MetricsLog
    bar: Advance
    stop: StopRequest
    scratch: Path

    @property
    def processes(self) -> Processes:
        return self.session.processes

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.session.roles.parameters_of(self.learner)

    def arguments(self, settings: Supervised) -> dict[str, Any]:
        """The arguments of transformers' Trainer that SFT and reward training share."""
        recipe, device = self.session.recipe, self.session.device.type
        return {
            "output_dir": str(self.scratch),
            "max_steps": self.steps,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "warmup_steps": int(settings.warmup_ratio * self.steps),  # the Trainer's own share is rounded up
            "weight_decay": settings.weight_decay,
            "max_grad_norm": 1.0,
            "seed": recipe.seed,
            "data_seed": recipe.seed,
            "use_cpu": device == "cpu",
            "bf16": False,  # the base has its dtype and the adapters are fp32: nothing is autocast
            "save_strategy": "steps",
            "save_steps": recipe.checkpoint_every,
            "eval_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": device == "cuda",
        }


def optimizer_steps(rows: int, settings: Supervised) -> int:
    """Steps of all epochs over so many rows."""
    return -(-rows // settings.batch_size) * settings.epochs


@contextlib.contextmanager
def training_run(session: Session, stage: StageName, steps: int) -> Iterator[TrainingRun]:
    """Open what the training of a stage writes, once the stage has all its roles.

    Args:
        steps: optimizer steps in all.
    """
    meter, checkpoints, done = session.meter(), session.checkpoints(stage), 0
    if (resumed := checkpoints.newest()) is not None:
        done = resumed.step
        meter.resume_from(resumed.values["meter"])
    with (
        session.folder.metrics(stage, done) as log,
        tempfile.TemporaryDirectory() as scratch,
        track(stage, steps, done) as bar,
        session.roles.checkpointed(session.recipe.checkpoint_activations),
        between_steps(session.processes) as stop,
    ):
        learner, folder = STAGE_ROLE[stage], Path(scratch)
        section = session.recipe.section(stage)
        assert isinstance(section, Supervised)
        yield TrainingRun(
            session, learner, steps, section.epochs, checkpoints, resumed, meter, log, bar, stop, folder
        )
