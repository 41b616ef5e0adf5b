"""What the stages of one run share: recipe, records, base with its roles, and run folder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from perl.errors import UserError
from perl.measure.meter import Meter
from perl.measure.probe import Kind
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE, Processes
from perl.recipe import Recipe, StageName
from perl.results import Stage
from perl.roles.roles import REWARD_MEMBERS, Role, Roles
from perl.roles.saved import Stamp, load_role, read_stamp, save_role, stamp_for, weights_sha256
from perl.roles.separate_models import SeparateModels
from perl.roles.shared_base import SharedBase
from perl.runs.checkpoint import Checkpoints
from perl.runs.folder import RunFolder
from perl.runs.validation import Kept
from perl.stages.material import Material, read_material
from perl.stages.reuse import ROLES, Identity, identify, settings_sha256
from perl.system.progress import console
from perl.system.seeds import derived_seed, seed_everything


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

    @property
    def engine(self) -> Engine:
        return self.roles.engine

    @property
    def processes(self) -> Processes:
        return self.roles.engine.processes

    @property
    def reward_members(self) -> tuple[Role, ...]:
        """The roles that are the reward stage's model; several are an ensemble."""
        return REWARD_MEMBERS[: self.recipe.reward.members] if self.recipe.reward is not None else ()

    def meter(self) -> Meter:
        """A meter of a stage that has all its roles."""
        return Meter(self.device, self.resident(), [model.base_model for model in self.roles.models()])

    def resident(self) -> dict[Kind, list[Tensor]]:
        """The tensors that live through the whole stage, by what they are for."""
        roles = [role for role in Role if role is not Role.BASE and self.recipe.tuning != "full"]
        adapters = {id(parameter) for parameter in self.roles.parameters_of(*roles)}
        resident: dict[Kind, list[Tensor]] = {"base_weights": [], "adapters": []}
        four_bit_scales = [tensor for _, tensor in scales(self.roles)]
        for tensor in (*self.roles.parameters(), *self.roles.buffers(), *four_bit_scales):
            resident["adapters" if id(tensor) in adapters else "base_weights"].append(tensor)
        return resident

    def stage(
        self,
        meter: Meter,
        trained: Sequence[nn.Parameter],
        rows: int | None = None,
        rows_cut: int | None = None,
        kept: Kept | None = None,
    ) -> Stage:
        """What a stage trained and cost, of all processes."""
        cost = meter.cost()
        cost = cost.of_all(self.processes.all_gather(cost))
        return Stage(
            **vars(cost),
            trainable_parameters=sum(one.numel() for one in trained),
            rows=rows,
            rows_cut=rows_cut,
            kept=None if kept is None else [kept],
        )

    def add_trained(self, role: Role, *, head: bool = False) -> list[nn.Parameter]:
        """Add the role that a supervised stage trains; return its parameters."""
        self.roles.add(role, head=head)
        self.roles.keep(role)
        return self.roles.train_only(role)

    def begin_together(self, trained: Iterable[Tensor]) -> None:
        """Give all processes the same weights to train, and each a dropout of its own."""
        self.processes.broadcast_tensors(trained)
        if not self.processes.main:
            torch.manual_seed(derived_seed(self.recipe.seed, "process", self.processes.rank))

    def saved(self, role: Role) -> Path:
        return self.folder.role(role) / self.roles.folder

    def save(self, role: Role, parent: Role | None = None, **more: Any) -> None:
        """Write a role's weights, stamped.

        Args:
            parent: the role it started from, if that was trained.
            more: further fields of the stamp.
        """
        if self.processes.main:
            inherited = self.saved(parent) if parent is not None else None
            if inherited is not None and inherited.exists():
                more |= {"parent": parent, "parent_sha256": weights_sha256(self.roles, inherited)}
            more["data_sha256"] = self.identities[_stage_of(role)].data_sha256
            save_role(self.roles, role, self.saved(role), stamp_for(role, self.base, **self._recipe(role), **more))
        self.processes.barrier()

    def _recipe(self, role: Role) -> dict[str, str]:
        settings = settings_sha256(self.recipe, _stage_of(role))
        return {"recipe": self.recipe.name, "recipe_sha256": settings}

    @cached_property
    def identities(self) -> dict[StageName, Identity]:
        """What each stage of the recipe depends on."""
        return identify(self.recipe, self.train, self.held_out, self.base)

    def load(self, role: Role) -> None:
        """Load a role's weights from the run folder, unless they are in memory, to compute with them."""
        if role not in self.roles.roles:
            load_role(self.roles, role, self.saved(role), self.base, **self._recipe(role))
            self.roles.eval()  # added adapters begin with dropout on

    def stamp(self, role: Role) -> Stamp:
        return read_stamp(self.saved(role))

    def checkpoints(self, role: Role) -> Checkpoints:
        """Of the training of a role."""
        stage = _stage_of(role)
        belongs = {
            "base": self.base.sha256,
            "recipe": settings_sha256(self.recipe, stage, any_length=True),
            "data": self.identities[stage].data_sha256,
        }
        if stage == "rl":
            earlier = (one for one in (Role.SFT, *REWARD_MEMBERS) if self.saved(one).exists())
            belongs |= {f"{one} role": weights_sha256(self.roles, self.saved(one)) for one in earlier}
        folder = self.folder.role(role) / "checkpoints"
        return Checkpoints(folder, self.recipe.checkpoint_every, belongs, self.processes)


def _stage_of(role: Role) -> StageName:
    return "reward" if role in REWARD_MEMBERS else next(stage for stage, roles in ROLES.items() if role in roles)


def open_session(
    recipe: Recipe, out: Path, material: Material | None = None, engine: Engine | None = None
) -> Session:
    """Read the data, check it for every stage, and load the base; nothing is written.

    Args:
        out: the run folder.
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
    material = material or read_material(recipe, engine)
    roles = _open_roles(recipe, material.base, material.lm, engine)
    return Session(recipe, folder, material.train, material.held_out, material.base, roles, material.device)


def open_run(run: str | Path) -> Session:
    """The session of a run that was started, to load its roles in.

    Raises:
        UserError: this is no run folder.
    """
    return open_session(RunFolder(Path(run)).recipe(), Path(run))


def check_engine(engine: Engine, recipe: Recipe) -> None:
    """Refuse what of a recipe the engine cannot do.

    Raises:
        UserError: saying what it can.
    """
    sizes = {
        "sft.batch_size": recipe.sft and recipe.sft.batch_size,
        "reward.batch_size": recipe.reward and recipe.reward.batch_size,
        "rl.prompts_per_step": recipe.rl and recipe.rl.prompts_per_step,
    }
    for key, size in sizes.items():
        engine.processes.check_divides(size or 0, key)
    if recipe.tuning == "full" and type(engine) is not Engine:
        raise UserError(
            f"{engine.name} shards a frozen base and the optimizer of adapters; full tuning has neither",
            where="tuning: full",
            remedy="Set tuning: lora, or launch plainly (recipes/engines/ddp.yaml).",
        )
    if recipe.base.quantization != "none" and engine.shards_base:
        raise UserError(
            f"{engine.name} cannot spread quantized weights",
            where=f"base.quantization: {recipe.base.quantization}",
            remedy="Set base.quantization: none, or launch with recipes/engines/ddp.yaml or zero2.yaml.",
        )


def _open_roles(recipe: Recipe, base: Base, lm: PreTrainedModel, engine: Engine) -> Roles:
    """The base, ready for roles under the recipe's tuning."""
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
