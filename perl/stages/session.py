"""What the stages of one run share: the recipe, the records, the base with its roles, and the run folder."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters import ADAPTERS, AdapterKind
from perl.adapters.coverage import HALF
from perl.backbones import backbone_of
from perl.backbones.base import Base
from perl.backbones.four_bit import scales
from perl.data.records import Records
from perl.measure.meter import MEASURED_STEPS, Meter
from perl.measure.probe import Kind
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE, Processes
from perl.recipe import Recipe, StageName, Supervised
from perl.results import Stage
from perl.roles.roles import Role, Roles
from perl.roles.saved import Stamp, load_role, read_stamp, save_role, stamp_for, weights_sha256
from perl.roles.separate_models import SeparateModels
from perl.roles.shared_base import SharedBase
from perl.runs.checkpoint import Checkpoints
from perl.runs.folder import STAGE_ROLE, RunFolder
from perl.stages.engines import check_engine
from perl.stages.material import Material, read_material
from perl.system.progress import console
from perl.system.seeds import derived_seed, seed_everything

LEARNERS = (Role.SFT, Role.REWARD, Role.POLICY, Role.CRITIC)


@dataclass(frozen=True)
class Trial:
    """A stage is tried, for what it costs: nothing is evaluated or written, and rows are the longest there are."""

    steps: int
    abridged: bool = False
    """On fake tensors: no more is computed of a step than decides its peak memory."""
    measured: bool = True
    """Whether memory and operations are followed, which slows small models."""


@dataclass
class Session:
    """One process holds the base across all stages; it is loaded once."""

    recipe: Recipe
    folder: RunFolder
    train: Records
    held_out: Records
    base: Base
    roles: Roles
    device: torch.device
    trial: Trial | None = None

    @property
    def engine(self) -> Engine:
        """How the processes that run together hold the base."""
        return self.roles.engine

    @property
    def processes(self) -> Processes:
        """The processes that run together."""
        return self.roles.engine.processes

    def meter(self) -> Meter:
        """A meter that counts what is in memory now: begun when the stage has all its roles."""
        learned = {id(parameter) for role in LEARNERS for parameter in self.roles.parameters_of(role)}
        whole = self.recipe.tuning == "full"
        resident: dict[Kind, list[Tensor]] = {"base_weights": [], "adapters": []}
        of_four_bits = [tensor for _, tensor in scales(self.roles)]
        for tensor in (*self.roles.parameters(), *self.roles.buffers(), *of_four_bits):
            resident["adapters" if id(tensor) in learned and not whole else "base_weights"].append(tensor)
        trial = self.trial or Trial(0)
        trunks = [] if trial.abridged else [model.base_model for model in self.roles.models()]
        return Meter(self.device, resident, trunks, MEASURED_STEPS if trial.measured else 0)

    def stage(self, meter: Meter, trained: Sequence[nn.Parameter], rows: int, rows_cut: int) -> Stage:
        """What a stage trained and cost, of all processes."""
        cost = meter.cost()
        cost = cost.of_all(self.processes.all_gather(cost))
        parameters = sum(one.numel() for one in trained)
        return Stage(**vars(cost), trainable_parameters=parameters, rows=rows, rows_cut=rows_cut)

    def begin_together(self, learning: Iterable[Tensor]) -> None:
        """Let all processes train the same weights, and each draw a dropout of its own."""
        self.processes.broadcast_tensors(learning)
        if not self.processes.main:
            torch.manual_seed(derived_seed(self.recipe.seed, "process", self.processes.rank))

    def saved(self, role: Role) -> Path:
        """Where a role's weights are in the run folder."""
        return self.folder.role(role) / self.roles.folder

    def save(self, role: Role, parent: Role | None = None, **more: Any) -> None:
        """Write a role's weights, stamped; `parent` is the role it started from, if that was trained."""
        if self.processes.main:
            self._save(role, parent, more)
        self.processes.barrier()

    def _save(self, role: Role, parent: Role | None, more: dict[str, Any]) -> None:
        inherited = self.saved(parent) if parent is not None else None
        if inherited is not None and inherited.exists():
            more |= {"parent": parent, "parent_sha256": weights_sha256(self.roles, inherited)}
        save_role(self.roles, role, self.saved(role), stamp_for(role, self.base, **self._recipe(), **more))

    def _recipe(self) -> dict[str, str]:
        return {"recipe": self.recipe.name, "recipe_sha256": self.recipe.sha256}

    def load(self, role: Role) -> None:
        """Load a role's weights from the run folder, unless they are in memory; in a trial they are new."""
        if role in self.roles.roles:
            return
        if self.trial is not None:
            self.roles.add(role, head=role is Role.REWARD)
        else:
            load_role(self.roles, role, self.saved(role), self.base, **self._recipe())

    def stamp(self, role: Role) -> Stamp:
        """What is written beside a role's weights."""
        return stamp_for(role, self.base) if self.trial is not None else read_stamp(self.saved(role))

    def checkpoints(self, stage: StageName) -> Checkpoints:
        """The checkpoints of a stage."""
        belongs = {"base": self.base.sha256, "recipe": self.recipe.sha256}
        if stage == "rl":
            earlier = (role for role in (Role.SFT, Role.REWARD) if self.saved(role).exists())
            belongs |= {f"{role} role": weights_sha256(self.roles, self.saved(role)) for role in earlier}
        folder = self.folder.role(STAGE_ROLE[stage]) / "checkpoints"
        return Checkpoints(folder, self.recipe.checkpoint_every, belongs, self.processes)

    def trainer_settings(self, settings: Supervised, steps: int) -> dict[str, Any]:
        """Settings of transformers' Trainer that SFT and reward training share.

        Args:
            settings: the stage's section.
            steps: optimizer steps in all.
        """
        return {
            "num_train_epochs": settings.epochs,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "warmup_steps": int(settings.warmup_ratio * steps),  # the Trainer's own share is rounded up
            "weight_decay": settings.weight_decay,
            "seed": self.recipe.seed,
            "data_seed": self.recipe.seed,
            "use_cpu": self.device.type == "cpu",
            "bf16": False,  # the base has its dtype and the adapters are fp32: nothing is autocast
            "save_strategy": "no" if self.trial is not None else "steps",
            "save_steps": self.recipe.checkpoint_every,
            "eval_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": self.device.type == "cuda",
            "max_grad_norm": 1.0,
            "max_steps": -1 if self.trial is None else self.trial.steps,
        }


def open_session(
    recipe: Recipe,
    out: Path,
    trial: Trial | None = None,
    material: Material | None = None,
    engine: Engine | None = None,
) -> Session:
    """Read the data, check it for every stage, and load the base: nothing is written before all of it fits.

    Args:
        out: the run folder.
        trial: for what the stages are to be tried only.
        material: read before, by `read_material` for a recipe with the same seed, base and data.
        engine: how the processes that run together hold the base; each opens a session.

    Raises:
        UserError: whatever of the recipe, the data or the base cannot be used.
    """
    seed_everything(recipe.seed)
    engine = engine or Engine(ALONE)
    check_engine(engine, recipe)
    folder = RunFolder(out, engine.processes)
    folder.check(recipe)
    found = material or read_material(recipe, engine)
    roles = _open_roles(recipe, found.base, found.lm, engine)
    return Session(recipe, folder, found.train, found.held_out, found.base, roles, found.device, trial)


@contextlib.contextmanager
def trial_session(recipe: Recipe, trial: Trial) -> Iterator[Session]:
    """A session to try one stage in, its folder gone afterwards; seeded as a run's stages are.

    Raises:
        UserError: as `open_session`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(recipe, Path(scratch), trial)
        seed_everything(recipe.seed)
        yield session


def _open_roles(recipe: Recipe, base: Base, lm: PreTrainedModel, engine: Engine) -> Roles:
    """No roles on the base so far but all ready for them, under the recipe's tuning."""
    if recipe.tuning == "full":
        return SeparateModels(lm, base.load, engine)
    if engine.shards_base:
        backbone_of(lm.config).require("sharding", f"base.model {base.name}")
    roles = SharedBase(adapters_for(recipe, lm), engine)
    console.print(str(roles.coverage), style="yellow" if roles.coverage.share < HALF else None, markup=False)
    if roles.split_unsupported_reason is not None:
        console.print(
            f"[yellow]The blocks below the adapters are computed again for every role[/]: "
            f"{roles.split_unsupported_reason}."
        )
    return roles


def adapters_for(recipe: Recipe, lm: PreTrainedModel) -> AdapterKind:
    """The recipe's adapters, for this model.

    Raises:
        UserError: they do not fit it.
    """
    return ADAPTERS[recipe.adapter_kind](lm, recipe.adapter_settings)
