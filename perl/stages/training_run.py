"""One stage's training with transformers' Trainer: what it trains, for how long, and where its state goes."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from perl.measure.meter import Meter
from perl.parallel.processes import Processes
from perl.recipe import Supervised
from perl.roles.role import Role
from perl.runs.checkpoint import Checkpoints, State
from perl.runs.folder import MetricsLog
from perl.runs.validation import Validation
from perl.stages.auto_rates import learning_rate
from perl.stages.session import Session
from perl.system.interrupt import StopRequest, between_steps
from perl.system.progress import Advance, console, track


@dataclass(frozen=True)
class TrainingRun:
    """One stage's training."""

    session: Session
    learner: Role
    seed: int
    """Seed of the row order and of dropout."""
    steps: int
    """Total optimizer steps."""
    epochs: int
    """Passes over the rows in these steps."""
    checkpoints: Checkpoints
    resumed: State | None
    """The checkpoint to resume from; None: start from the beginning."""
    validation: Validation | None
    """Chooses the weights to keep; None: the last ones."""
    meter: Meter
    log: MetricsLog
    bar: Advance
    stop: StopRequest
    scratch: Path

    @property
    def processes(self) -> Processes:
        return self.session.processes

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        session = self.session
        return learning_rate(session.recipe, session.stage_of(self.learner), session.roles.models()[0].config)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.session.roles.parameters_of(self.learner)

    def arguments(self, settings: Supervised) -> dict[str, Any]:
        """Return the arguments of transformers' Trainer that SFT and reward training share."""
        saving = {"save_strategy": "steps", "save_steps": self.session.recipe.checkpoint_every}
        device = self.session.device.type
        settings = settings.model_copy(update={"learning_rate": self.learning_rate})
        return trainer_arguments(settings, self.steps, self.seed, device, self.scratch) | saving


def trainer_arguments(settings: Supervised, steps: int, seed: int, device: str, scratch: Path) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer that all training with it shares."""
    return {
        "output_dir": str(scratch),
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": int(settings.warmup_ratio * steps),  # the Trainer would round the ratio's steps up
        "weight_decay": settings.weight_decay,
        "max_grad_norm": 1.0,
        "seed": seed % 2**32,
        "data_seed": seed % 2**32,
        "use_cpu": device == "cpu",
        "bf16": False,  # no autocast: the base has its dtype, and the adapters are fp32
        "eval_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device == "cuda",
    }


def optimizer_steps(rows: int, settings: Supervised) -> int:
    """Return the optimizer steps of all epochs for this number of rows."""
    return -(-rows // settings.batch_size) * settings.epochs


@contextlib.contextmanager
def training_run(
    session: Session, learner: Role, seed: int, steps: int, validation: Validation | None = None
) -> Iterator[TrainingRun]:
    """Open the logs and checkpoints of a role's training, once the stage has all its roles.

    Args:
        seed: seed of the row order and of dropout.
        steps: total optimizer steps.
        validation: chooses the weights to keep; None: the last ones.
    """
    meter, checkpoints, done = session.meter(), session.checkpoints(learner), 0
    if (resumed := checkpoints.newest()) is not None:
        done = resumed.step
        meter.resume_from(resumed.values["meter"])
        if validation is not None:
            validation.load_state_dict(resumed.values["validation"], steps)
    with (
        session.metrics(learner, done) as log,
        tempfile.TemporaryDirectory() as scratch,
        track(learner, steps, done) as bar,
        session.roles.checkpointed(session.recipe.checkpoint_activations),
        between_steps(session.processes) as stop,
    ):
        folder, section = Path(scratch), session.recipe.section(session.stage_of(learner))
        assert isinstance(section, Supervised)
        epochs = section.epochs
        run = TrainingRun(
            session, learner, seed, steps, epochs, checkpoints, resumed, validation, meter, log, bar, stop, folder
        )
        if section.learning_rate == "auto":
            console.print(f"{learner}: learning rate {run.learning_rate:g}, from the base's width and kind")
        yield run


def loss_validation(settings: Supervised, rows: int, by: str = "loss") -> Validation | None:
    """Return validation by a loss on this number of rows, if the recipe has it; `by` is the loss's name."""
    if settings.eval_steps is None:
        return None
    return Validation(settings.eval_steps, settings.early_stopping_patience, by, rows, sign=-1)
