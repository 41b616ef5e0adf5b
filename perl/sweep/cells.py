"""The cells of a sweep: one stage trained with one setting and one seed, each in its own run folder.

In a sweep of RL only RL varies: SFT and the reward model are trained once per seed with the unchanged recipe. The
SFT policy is merged into the base, so that adapters of every kind and full tuning start from it, and the reward
model is that of another run (`rl.reward: {kind: run}`), on a separate base.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.markup import escape
from transformers import PreTrainedConfig, PreTrainedModel

from perl.adapters import AdapterKind
from perl.errors import UserError
from perl.recipe import STAGES, Recipe, StageName
from perl.recipe.reward_parts import ModelPart, RewardPart
from perl.report.runs import Run, read_run
from perl.roles.role import Role
from perl.runs.folder import RunFolder
from perl.stages.export import export_role
from perl.stages.identity import identify, recorded, refuse_changed
from perl.stages.material import Material, read_material
from perl.stages.opening import adapters_for, open_run
from perl.stages.pipeline import run
from perl.stages.training import NotFiniteError
from perl.sweep.setting import FULL, Setting, size_key
from perl.system.progress import console, silence

DIVERGED = "diverged"
"""File in a cell's folder that marks it as diverged, so that it is not tried again."""
COUNTED = "counted"
"""Name of a role that is only created to count its weights."""


@dataclass
class Cells:
    """All cells of a stage.

    Attributes:
        recipe: the complete recipe; RL starts from its other stages.
        out: the folder of all cells.
    """

    recipe: Recipe
    stage: StageName
    out: Path
    _material: tuple[Recipe, Material] | None = field(default=None, init=False)
    """Data and base of the last cell, the base without adapters."""

    def alone(self, seed: int) -> Recipe:
        """Return the recipe with only this stage; for RL, it starts from the results of the earlier stages."""
        content = self.recipe.model_dump() | {"seed": seed}
        others = [stage for stage in self.recipe.stages if stage != self.stage]
        if self.stage == "rl" and self.recipe.rl is not None and others:
            folder = self._earlier(seed)
            if self.recipe.sft is not None:
                keys = ("dtype", "quantization", "trust_remote_code")
                content["base"] = {key: content["base"][key] for key in keys} | {"model": str(folder / "merged")}
            content["rl"]["reward"] = _of_run(self.recipe.rl.reward_parts, folder, "rl.reward")
            if judging := self.recipe.rl.eval_reward_parts:
                content["rl"]["eval_reward"] = _of_run(judging, folder, "rl.eval_reward")
        return Recipe.model_validate(content | dict.fromkeys(others))

    def check(self, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
        """Refuse, before any training, settings that cannot be trained.

        Raises:
            UserError: the data, the base or a setting cannot be used, or a folder holds another run.
        """
        lm = self._base(seeds[0])
        if self.stage == "rl" and self.recipe.sft is not None:
            self._check_merged(lm)
        for seed in seeds if self.stage == "rl" else ():
            if (before := self._recipe_before(seed)) is not None:
                RunFolder(self._earlier(seed)).check(before)
        for setting in settings:
            for seed in seeds:
                RunFolder(setting.folder(self.out, seed)).check(setting.recipe(self.alone(seed), seed))
            if setting.kind != FULL:
                adapters_for(setting.recipe(self.alone(seeds[0]), seeds[0]), lm)
        del lm  # frees its memory for that of another seed
        for seed in seeds:
            self._check_unchanged(settings, seed)

    def _check_unchanged(self, settings: Sequence[Setting], seed: int) -> None:
        """Refuse to go on if the data, the base or a file has changed since a cell of this seed was trained.

        A cell that diverged with something else than there is now is tried again.
        """
        cells = [(setting.folder(self.out, seed), setting.recipe(self.alone(seed), seed)) for setting in settings]
        if self.stage == "rl" and (before := self._recipe_before(seed)) is not None:
            cells.insert(0, (self._earlier(seed), before))
        for path, recipe in cells:
            folder = RunFolder(path)
            if not any(recorded(folder, stage) for stage in recipe.stages):
                continue
            with silence():
                found = self._read(recipe.model_copy(update={"tuning": "lora"}))  # full tuning's are the same
            now = identify(recipe, found.train, found.held_out, found.base, {})
            refuse_changed(folder, now, "there, the sweep trains every setting again")
            there = {stage: recorded(folder, stage) for stage in now}
            if any(one and one.differences(now[stage]) for stage, one in there.items()):
                (path / DIVERGED).unlink(missing_ok=True)

    def _check_merged(self, lm: PreTrainedModel) -> None:
        kind, quantization = type(adapters_for(self.recipe, lm)), self.recipe.base.quantization
        if kind.deltas is AdapterKind.deltas or quantization != "none":
            raise UserError(
                "the SFT policy, from which RL starts with every setting, cannot be merged into the base",
                where=f"adapter.kind {self.recipe.adapter_kind}, base.quantization {quantization}",
                remedy="Use adapters of kind lora on unquantized weights, or remove the section sft.",
            )

    def run(self, setting: Setting, seed: int) -> Run | None:
        """Train a cell, resume it, or read it if it is finished; return None if its training diverged."""
        recipe, folder = setting.recipe(self.alone(seed), seed), setting.folder(self.out, seed)
        RunFolder(folder).check(recipe)
        self._check_unchanged([setting], seed)  # its rate may not have been known before
        if (folder / DIVERGED).exists():
            return None
        if (folder / "report.json").exists():
            console.print(f"[bold]{setting.words}, seed {seed}[/] is finished in {escape(str(folder))}")
        else:
            if self.stage == "rl":
                self._train_earlier(seed)
            console.print(f"[bold]{setting.words}, seed {seed}[/] in {escape(str(folder))}")
            try:
                run(recipe, folder, material=self._read(recipe))
            except NotFiniteError as error:
                console.print(f"[yellow]Diverged[/]: {escape(str(error))}")
                (folder / DIVERGED).touch()
                return None
        return read_run(folder)

    def _read(self, recipe: Recipe) -> Material:
        """Read data and base, once for all successive cells that share them; full tuning changes the base."""
        if recipe.tuning == "full":
            self._material = None
            gc.collect()
            return read_material(recipe)
        shared = recipe.model_copy(update=dict.fromkeys(("lora", "adapter", *STAGES)))
        if self._material is None or self._material[0] != shared:
            self._material = None  # frees its memory for the next one
            self._material = shared, read_material(recipe)
        return self._material[1]

    def _base(self, seed: int) -> PreTrainedModel:
        """Return the recipe's base."""
        recipe = self.recipe if self.stage == "rl" else self.alone(seed)
        return self._read(recipe.model_copy(update={"seed": seed, "tuning": "lora"})).lm

    def config(self) -> PreTrainedConfig:
        """Return the base's configuration."""
        return self._base(self.recipe.seed).config

    def _earlier(self, seed: int) -> Path:
        return (self.out / f"earlier-{seed}").absolute()

    def _recipe_before(self, seed: int) -> Recipe | None:
        """Return the recipe of the stages before RL; None if there are none."""
        if self.recipe.sft is None and self.recipe.reward is None:
            return None
        return Recipe.model_validate(self.recipe.model_dump() | {"rl": None, "seed": seed})

    def _train_earlier(self, seed: int) -> None:
        """Train the stages before RL, and merge the SFT policy into a copy of the base."""
        recipe, folder = self._recipe_before(seed), self._earlier(seed)
        if recipe is None:
            return
        if not (folder / "report.json").exists():
            console.print(f"[bold]stages before RL, seed {seed}[/] in {escape(str(folder))}")
            run(recipe, folder)
        if self.recipe.sft is not None and not (folder / "merged").exists():
            export_role(open_run(folder), Role.SFT, "sft", folder / "merged", whole=True)

    def equally_large(self, settings: Sequence[Setting], seed: int) -> Iterator[Setting]:
        """Yield the settings with sizes that bring their numbers of weights closest to the first one's.

        Full tuning and kinds without a size are unchanged.

        Raises:
            UserError: the first setting is full tuning.
        """
        lm = self._base(seed)

        def weights(setting: Setting) -> int:
            adapters = adapters_for(setting.recipe(self.alone(seed), seed), lm)
            adapters.inject(COUNTED)
            try:
                return sum(parameter.numel() for parameter in adapters.parameters(COUNTED).values())
            finally:
                adapters.remove()

        first, *others = settings
        if first.kind == FULL:
            what, remedy = "adapters cannot have as many weights as full tuning", "Name a kind of adapters first."
            raise UserError(what, where="--equal-weights", remedy=remedy)
        yield first
        wanted = weights(first)
        for setting in others:
            if setting.kind == FULL or size_key(setting.kind) is None:
                yield setting
                continue
            one, two = (weights(replace(setting, size=size)) for size in (1, 2))  # it grows linearly
            yield replace(setting, size=max(1, 1 + round((wanted - one) / (two - one))))


def _of_run(parts: Sequence[RewardPart], run: Path, where: str) -> list[dict[str, object]]:
    """Return the parts of a reward with the reward model replaced by that of another run.

    Raises:
        UserError: a part combines members in a way that is not supported for another run's reward model.
    """
    if any(isinstance(part, ModelPart) and (part.members or part.combine != "mean") for part in parts):
        raise UserError(
            "a sweep of RL uses the reward model of a separate run: the mean of all its members",
            where=where,
            remedy="Leave members and combine out.",
        )
    return [
        {"kind": "run", "run": str(run), "weight": part.weight} if part.needs_model else part.model_dump()
        for part in parts
    ]
