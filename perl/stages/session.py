"""The session that the stages of one run share: recipe, records, base with its roles, and run folder."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from perl.adapters.folder import WEIGHTS, read_adapter_folder
from perl.backbones.base import Base
from perl.backbones.four_bit import scales
from perl.backbones.tokens import Tokens
from perl.data.records import Records, Turn
from perl.measure.meter import Meter
from perl.measure.probe import Kind
from perl.parallel.engine import Engine
from perl.parallel.processes import Processes
from perl.recipe import Recipe, Rl, StageName
from perl.results import Stage, Start
from perl.roles.role import REWARD_MEMBERS, Role
from perl.roles.roles import Roles
from perl.roles.saved import Stamp, load_role, read_stamp, save_role, stamp_for, weights_sha256
from perl.roles.shared_base import SharedBase
from perl.roles.started import load_start
from perl.runs.checkpoint import Checkpoints
from perl.runs.folder import STAGE_ROLE, MetricsLog, RunFolder
from perl.runs.trackers import sending
from perl.runs.validation import Kept
from perl.stages.identity import (
    ROLES,
    Identity,
    identify,
    settings_sha256,
    sha256_or_missing,
    trained_settings_sha256,
)
from perl.system.plain_yaml import flat_keys
from perl.system.progress import console
from perl.system.seeds import derived_seed

if TYPE_CHECKING:
    from perl.stages.sft import SftRows

AnswerKey = tuple[tuple[Turn, ...], Turn, int]
"""A context, an answer, and the maximum length of both together."""


@dataclass
class Session:
    """The state that all stages of a run share; the base is loaded once per process."""

    recipe: Recipe
    folder: RunFolder
    train: Records
    held_out: Records
    base: Base
    roles: Roles
    device: torch.device
    after_checkpoint: Callable[[], None] = lambda: None
    """Called after each checkpoint has been written."""
    answer_tokens: dict[AnswerKey, Tokens] = field(default_factory=dict)
    """Cache of tokenized answers: rows are tokenized for the checks, and again for training."""
    sft_rows: "SftRows | None" = None
    """Rows of SFT that have been tokenized for its check, until it trains on them."""

    def __post_init__(self) -> None:
        self.roles.asked_score_terms = self.recipe.reward.score_terms if self.recipe.reward is not None else ()

    @property
    def engine(self) -> Engine:
        return self.roles.engine

    @property
    def processes(self) -> Processes:
        return self.roles.engine.processes

    @property
    def reward_members(self) -> tuple[Role, ...]:
        """The roles that make up the reward model; several are an ensemble."""
        return REWARD_MEMBERS[: self.recipe.reward.members] if self.recipe.reward is not None else ()

    def meter(self) -> Meter:
        """Return a meter for a stage whose roles have all been added."""
        return Meter(self.device, self.resident(), self.roles.trunks())

    def resident(self) -> dict[Kind, list[Tensor]]:
        """Return the tensors that live through the whole stage, by their kind."""
        adapters: set[int] = set()
        if self.recipe.tuning != "full":
            learned = self.roles.parameters_of(*(role for role in Role if role is not Role.BASE))
            adapters = {id(tensor) for tensor in (*learned, *self.roles.score_terms.buffers())}
        resident: dict[Kind, list[Tensor]] = {"base_weights": [], "adapters": []}
        four_bit_scales = [tensor for _, tensor in scales(self.roles)]
        for tensor in (*self.roles.parameters(), *self.roles.buffers(), *four_bit_scales):
            resident["adapters" if id(tensor) in adapters else "base_weights"].append(tensor)
        return resident

    def stage(
        self,
        meter: Meter,
        trained: Sequence[nn.Parameter],
        learning_rate: float | None,
        rows: int | None = None,
        rows_cut: int | None = None,
        kept: Kept | None = None,
    ) -> Stage:
        """Return what a stage trained, at what peak learning rate if any, and its cost over all processes."""
        cost = meter.cost()
        cost = cost.of_all(self.processes.all_gather(cost))
        return Stage(
            **vars(cost),
            trainable_parameters=sum(one.numel() for one in trained),
            learning_rate=learning_rate,
            rows=rows,
            rows_cut=rows_cut,
            kept=None if kept is None else [kept],
        )

    def add_trained(self, role: Role, *, head: bool = False) -> list[nn.Parameter]:
        """Add the role that a supervised stage trains, with its initial weights; return its parameters."""
        self.roles.add(role, head=head)
        self.start(role)
        self.roles.keep(role)
        return self.roles.train_only(role)

    def begin_together(self, trained: Iterable[Tensor]) -> None:
        """Give all processes the same initial weights, and each process its own dropout seed."""
        self.processes.broadcast_tensors(trained)
        if not self.processes.main:
            torch.manual_seed(derived_seed(self.recipe.seed, "process", self.processes.rank))

    def max_length(self, stage: Literal["sft", "reward"]) -> int:
        """Return the largest number of tokens of a supervised stage's rows."""
        section = self.recipe.section(stage)
        assert not isinstance(section, Rl)
        return min(section.max_length, self.base.context_length)

    def saved(self, role: Role) -> Path:
        """Return the folder of a role's weights."""
        return self.folder.role(role) / self.roles.folder

    def save(self, role: Role, parent: Role | None = None, **more: Any) -> None:
        """Save a role's weights and stamp.

        Args:
            parent: the role that it started from, if that role was trained.
            more: additional fields of the stamp.
        """
        if self.processes.main:
            inherited = self.saved(parent) if parent is not None else None
            if inherited is not None and inherited.exists():
                more |= {"parent": parent, "parent_sha256": weights_sha256(self.roles, inherited)}
            stage = self.stage_of(role)
            if stage in self.starts and role is not Role.CRITIC:
                start = self.starts[stage]
                more |= {"started_from": start.folder, "started_sha256": start.sha256}
            more["data_sha256"] = self.identities[stage].data_sha256
            save_role(self.roles, role, self.saved(role), stamp_for(role, self.base, **self._recipe(role), **more))
        self.processes.barrier()

    def _recipe(self, role: Role) -> dict[str, str]:
        settings = trained_settings_sha256(self.folder, self.recipe, self.stage_of(role))
        return {"recipe": self.recipe.name, "recipe_sha256": settings}

    @cached_property
    def identities(self) -> dict[StageName, Identity]:
        """The identity of each stage of the recipe."""
        return identify(self.recipe, self.train, self.held_out, self.base, self.starts)

    @cached_property
    def starts(self) -> dict[StageName, Start]:
        """The adapters that stages start from; a finished stage's adapter may have been deleted since."""
        found: dict[StageName, Start] = {}
        for stage, folder in self.recipe.starts.items():
            sha256, result = sha256_or_missing(Path(folder) / WEIGHTS), self.folder.result(stage)
            deleted = result.started_from if result is not None and sha256 == "missing" else None
            found[stage] = deleted or Start(folder=folder, sha256=sha256)
        return found

    def start(self, role: Role, *, quiet: bool = False) -> None:
        """Load the adapter that the recipe names as a stage's start, if any, into the stage's new role.

        Raises:
            UserError: the stage cannot start from that adapter.
        """
        stage = self.stage_of(role)
        if stage not in self.recipe.starts:
            return
        assert isinstance(self.roles, SharedBase)
        folder = read_adapter_folder(Path(self.recipe.starts[stage]), f"{stage}.adapter")
        notes = load_start(self.roles, role, folder, self.base)
        if not quiet:
            notes = [f"{stage} starts from the adapter in {folder.path}", *notes]
            console.print(f"{'; '.join(notes)}.", markup=False)

    def check_start(self, stage: StageName) -> None:
        """Refuse an adapter that a stage cannot start from; the adapter is not kept in memory."""
        if stage in self.recipe.starts:
            assert isinstance(self.roles, SharedBase)
            role = Role.SFT if stage == "rl" else STAGE_ROLE[stage]
            self.roles.add(role, head=role is Role.REWARD)
            try:
                self.start(role, quiet=True)
            finally:
                self.roles.clear()

    def load(self, role: Role) -> None:
        """Load a role's weights from the run folder, unless they are in memory.

        In a recipe without a section `sft`, RL's reference is first copied from `rl.adapter` to the run folder.
        """
        if role in self.roles.roles:
            return
        if self.stage_of(role) == "rl" and role is Role.SFT:
            there = self.processes.all_gather(self._is_started())
            if not all(there):
                self.roles.add(role)
                self.start(role)
                self.save(role)
                return
        load_role(self.roles, role, self.saved(role), self.base, **self._recipe(role))
        self.roles.eval()  # new adapters start with dropout on

    def load_reference(self) -> None:
        """Load RL's reference, from which the policy starts; there is nothing to load if it is the base."""
        if self.recipe.has_reference:
            self.load(Role.SFT)

    def _is_started(self) -> bool:
        """Return whether RL's reference is in the run folder.

        Before RL's first checkpoint, it may be from another adapter.
        """
        if not self.saved(Role.SFT).exists():
            return False
        return self.folder.begun("rl") or self.stamp(Role.SFT).started_sha256 == self.starts["rl"].sha256

    def stamp(self, role: Role) -> Stamp:
        """Return the stamp of a saved role."""
        return read_stamp(self.saved(role))

    @contextlib.contextmanager
    def metrics(self, role: Role, done: int) -> Iterator[MetricsLog]:
        """Open the metrics log of a role's training; metrics are also sent to the recipe's `report_to`."""
        names, stage = self.report_to if self.processes.main else [], self.stage_of(role)
        shown = stage if role is STAGE_ROLE[stage] else role  # further members of a reward ensemble are separate
        settings = flat_keys(self.recipe.model_dump(mode="json"))
        with (
            sending(names, self.recipe.name, shown, self.folder.path, settings, done) as send,
            self.folder.metrics(role, done, send) as log,
        ):
            yield log

    @property
    def report_to(self) -> Sequence[str]:
        return self.recipe.report_to

    def checkpoints(self, role: Role) -> Checkpoints:
        """Return the checkpoints of a role's training."""
        stage = self.stage_of(role)
        belongs = {
            "base": self.base.sha256,
            "recipe": settings_sha256(self.recipe, stage, any_length=True),
            "data": self.identities[stage].data_sha256,
        }
        if stage == "rl":
            earlier = (one for one in (Role.SFT, *REWARD_MEMBERS) if self.saved(one).exists())
            belongs |= {f"{one} role": weights_sha256(self.roles, self.saved(one)) for one in earlier}
        folder = self.folder.role(role) / "checkpoints"
        return Checkpoints(
            folder, self.recipe.checkpoint_every, belongs, self.processes, lambda: self.after_checkpoint()
        )

    def stage_of(self, role: Role) -> StageName:
        """Return the stage that writes a role."""
        if role in REWARD_MEMBERS:
            return "reward"
        if role is Role.SFT and self.recipe.sft is None:
            return "rl"  # RL starts from it
        return next(stage for stage, roles in ROLES.items() if role in roles)
