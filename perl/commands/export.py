"""`export`: a role as a separate folder, which peft or transformers loads without the run and without PERL."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perl.commands.options import Run, say_loading
from perl.errors import UserError
from perl.recipe import Recipe, StageName
from perl.system.files import user_named
from perl.system.progress import console

if TYPE_CHECKING:
    from perl.report.model_card import Exported
    from perl.stages.session import Session

MEMBERS = [f"reward_{number}" for number in range(2, 9)]
"""Further members of a reward ensemble."""
ROLES: dict[str, StageName] = {"sft": "sft", "reward": "reward", "policy": "rl", "critic": "rl"}
STAGES: dict[str, StageName] = {**ROLES, **dict.fromkeys(MEMBERS, "reward")}
"""The stage in which each role is trained."""


def export(
    run: Run,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="sft, reward, policy or critic; reward_2 ...")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge adapter and base into a whole model.")] = False,
    hub: Annotated[str, typer.Option("--push-to-hub", metavar="REPO", help="Upload it too; private if new.")] = "",
    as_lora: Annotated[
        int | None,
        typer.Option("--as-lora", metavar="RANK", min=1, help="Convert any kind of adapter to LoRA of this rank."),
    ] = None,
) -> None:
    """Write a role as an adapter that plain peft loads, or a model that plain transformers loads."""
    if role not in STAGES:
        remedy = f"Use {', '.join(list(ROLES)[:-1])} or {list(ROLES)[-1]}; for an ensemble also {MEMBERS[0]} ..."
        raise UserError(f"no role {role!r} to export", where="ROLE", remedy=remedy)
    with user_named(folder):
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise UserError(what, where=str(folder), remedy="Name a new folder, or remove this one.")
    say_loading()
    from perl.backbones.hub import why_not_asked
    from perl.roles.role import Role
    from perl.stages.export import export_role
    from perl.stages.opening import open_run
    from perl.system.publish import check_repository, push_to_hub

    if hub:
        check_repository(hub)
    recipe = _recipe_with(run, role)
    whole = merge or recipe.tuning == "full"
    _check_form(recipe, whole, as_lora)
    session = open_run(run)
    with user_named(folder):
        exported = export_role(session, Role(role), STAGES[role], folder, whole, as_lora)
    _say(session, exported, folder)
    if hub:
        push_to_hub(folder, hub, why_not_asked())


def _recipe_with(run: Path, role: str) -> Recipe:
    """Return the run's recipe, if the run has finished training this role."""
    from perl.runs.folder import RunFolder

    stage, recipe = STAGES[role], RunFolder(run).recipe()
    what = remedy = ""
    if stage not in recipe.stages:
        has = ", ".join(role for role, stage in ROLES.items() if stage in recipe.stages)
        what, remedy = f"the run has no {role}", f"Its recipe has no section {stage}. Roles it can have: {has}."
    elif recipe.reward is not None and role in MEMBERS[recipe.reward.members - 1 :]:
        what, remedy = f"the run has no {role}", f"Its reward.members is {recipe.reward.members}."
    elif role == "critic" and recipe.critic == "none":
        assert recipe.rl is not None
        what = f"the run has no critic: {recipe.rl.algorithm} needs none"
        remedy = "A critic is trained if rl.advantage is gae or return; see perl-rlhf algorithms."
    elif RunFolder(run).result(stage) is None:
        what = f"{stage} is not finished"
        remedy = "Run the recipe again with the same --out: it continues where it stopped."
    if what:
        raise UserError(what, where=str(run), remedy=remedy)
    return recipe


def _check_form(recipe: Recipe, whole: bool, rank: int | None) -> None:
    """Refuse an export that could be written but not loaded as the model that was trained."""
    if whole and rank is not None:
        full = recipe.tuning == "full"
        raise UserError(
            "the run was trained by full tuning, which has no adapter" if full else "a whole model has no adapter",
            where="--as-lora",
            remedy=f"Leave --as-lora out{'' if full else ', or --merge'}.",
        )
    if not whole and recipe.base.random_init:
        raise UserError(
            "the base's weights were initialized at random for this run: others cannot load them by any name",
            where="base.random_init",
            remedy="Export with --merge: the whole model.",
        )
    if whole and recipe.base.quantization == "4bit":
        raise UserError(
            "the adapter was trained on 4-bit weights; merged into unquantized ones it would be a different model",
            where="--merge",
            remedy="Export the adapter (without --merge), and load its base in 4 bits (NF4) as the card says.",
        )


def _say(session: "Session", exported: "Exported", folder: Path) -> None:
    from perl.report.model_card import TITLES

    form, settings = "a whole model" if exported.whole else "an adapter", session.recipe.base
    written = f"Written: {folder}: the {TITLES[exported.role]}, {form}; README.md there says how to load it."
    console.print(written, markup=False)
    if (conversion := exported.conversion) is not None:
        console.print(f"{conversion.kind} as LoRA: {conversion}.", markup=False)
        if advice := conversion.advice:
            console.print(advice, style="yellow", markup=False)
    if (difference := exported.difference) is not None:
        by = f"Its scores with transformers ({settings.dtype}) differ from the run's by at most {difference:.1g}"
        if exported.stage == "reward":
            by += f" on rows of up to {session.max_length('reward')} tokens; the run cuts longer ones"
        console.print(f"{by}.", markup=False)
    if exported.role in (members := session.reward_members)[: len(members) * (len(members) > 1)]:
        others = ", ".join(role for role in members if role is not exported.role)
        console.print(f"It is one of {len(members)} members of an ensemble; the others: {others}.", markup=False)
    if not exported.whole and Path(session.base.name).exists():
        warning = (
            f"It needs its base, {session.base.name}: a folder on this machine, which others do not have. "
            "If they have it elsewhere, set base_model_name_or_path in adapter_config.json to that path. "
            + ("" if settings.quantization == "4bit" else "To share the whole model, export with --merge.")
        )
        console.print(warning, style="yellow", markup=False)
