"""Opens the session of a run, with its base loaded and ready for roles."""

from pathlib import Path

from transformers import PreTrainedModel

from perl.adapters import ADAPTERS, AdapterKind
from perl.adapters.coverage import HALF
from perl.backbones import backbone_of
from perl.backbones.base import Base
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE
from perl.recipe import Recipe
from perl.roles.roles import Roles
from perl.roles.separate_models import SeparateModels
from perl.roles.shared_base import SharedBase
from perl.runs.folder import RunFolder
from perl.runs.trackers import require
from perl.stages.material import Material, read_material
from perl.stages.session import Session
from perl.system.progress import console, counted
from perl.system.seeds import seed_everything


def open_session(
    recipe: Recipe, out: Path, material: Material | None = None, engine: Engine | None = None
) -> Session:
    """Read the data, check it for every stage, and load the base; nothing is written.

    Args:
        out: the run folder.
        material: from an earlier `read_material` for a recipe with the same seed, base and data.
        engine: how the processes of the run hold the base; each process opens a session.

    Raises:
        UserError: the recipe, the data or the base cannot be used.
    """
    seed_everything(recipe.seed)
    engine = engine or Engine(ALONE)
    check_engine(engine, recipe)
    require(recipe.report_to)
    folder = RunFolder(out, engine.processes)
    folder.check(recipe)
    material = material or read_material(recipe, engine)
    roles = _open_roles(recipe, material.base, material.lm, engine)
    return Session(recipe, folder, material.train, material.held_out, material.base, roles, material.device)


def open_run(run: str | Path) -> Session:
    """Open the session of an existing run, to load its roles.

    Raises:
        UserError: this is not a run folder.
    """
    return open_session(RunFolder(Path(run)).recipe(), Path(run))


def check_engine(engine: Engine, recipe: Recipe) -> None:
    """Refuse recipes that the engine does not support.

    Raises:
        UserError: says what to change.
    """
    sizes = {
        "sft.batch_size": recipe.sft and recipe.sft.batch_size,
        "reward.batch_size": recipe.reward and recipe.reward.batch_size,
        "rl.prompts_per_step": recipe.rl and recipe.rl.prompts_per_step,
    }
    for key, size in sizes.items():
        engine.processes.check_divides(size or 0, key)
    if (rl := recipe.rl) is not None:
        completions = rl.prompts_per_step * rl.samples_per_prompt // engine.processes.count
        if rl.minibatches > completions:
            raise UserError(
                f"{counted(completions, 'completion')} per process cannot make {rl.minibatches} minibatches",
                where="rl.minibatches",
                remedy=f"Set it to at most {completions}, raise rl.prompts_per_step, or launch fewer processes.",
            )
    if recipe.tuning == "full" and type(engine) is not Engine:
        raise UserError(
            f"{engine.name} shards a frozen base and the optimizer of adapters; full tuning has neither",
            where="tuning: full",
            remedy="Set tuning: lora, or launch with recipes/engines/ddp.yaml.",
        )
    if recipe.base.quantization != "none" and engine.shards_base:
        raise UserError(
            f"{engine.name} cannot shard quantized weights",
            where=f"base.quantization: {recipe.base.quantization}",
            remedy="Set base.quantization: none, or launch with recipes/engines/ddp.yaml or zero2.yaml.",
        )


def _open_roles(recipe: Recipe, base: Base, lm: PreTrainedModel, engine: Engine) -> Roles:
    """Return the base, ready for roles under the recipe's tuning."""
    if recipe.tuning == "full":
        return SeparateModels(lm, base.load, engine)
    if engine.shards_base:
        backbone_of(lm.config).require("sharding", f"base.model {base.name}")
    roles = SharedBase(adapters_for(recipe, lm), engine)
    console.print(str(roles.coverage), style="yellow" if roles.coverage.share < HALF else None, markup=False)
    if roles.split_unsupported_reason is not None:
        console.print(
            f"[yellow]The blocks below the adapters are computed separately for every role[/]: "
            f"{roles.split_unsupported_reason}."
        )
    return roles


def adapters_for(recipe: Recipe, lm: PreTrainedModel) -> AdapterKind:
    """Return the recipe's kind of adapter, set up for this model.

    Raises:
        UserError: it does not fit the model.
    """
    try:
        return ADAPTERS[recipe.adapter_kind](lm, recipe.adapter_settings)
    except UserError as error:
        if not recipe.starts:
            raise
        stage, folder = next(iter(recipe.starts.items()))  # the settings are this adapter's
        raise UserError(
            f"the adapter does not fit the base: {error.what} ({error.where})",
            where=f"{stage}.adapter: {folder}",
            remedy="Use the base that it was trained on, or an adapter of this base.",
        ) from None
