"""Decides which stages have to be trained, and which can be reused from another run.

A stage with the same identity (`perl.stages.identity`) is taken from the other run instead of being trained again.

If only the number of epochs or steps is raised, a finished stage is continued, and ends with the same bytes as if
it had been trained in one go. That requires a learning rate that does not depend on the number of steps:
`constant`, or `constant_with_warmup` and `inverse_sqrt` without warmup.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.markup import escape

from perl.errors import UserError
from perl.recipe import Recipe, Rl, StageName
from perl.roles.role import Role
from perl.runs.folder import STAGE_ROLE, RunFolder
from perl.stages.identity import LENGTH, ROLES, Identity, differing, recorded
from perl.system.files import whole_folder, write_json
from perl.system.progress import console
from perl.system.typed_json import as_json

FOR_ANY_LENGTH = ("constant_with_warmup", "inverse_sqrt")
"""Schedules that do not depend on the number of steps if there is no warmup; `constant` never does."""


@dataclass(frozen=True)
class Found:
    """What another run offers for a stage.

    Attributes:
        use: take it unchanged, continue it for more epochs or steps, or train the stage here.
        why: why it cannot be taken unchanged.
    """

    source: RunFolder
    use: Literal["take", "continue", "train"]
    why: str = ""


def look_up(recipe: Recipe, stage: StageName, here: Identity, source: RunFolder) -> Found:
    """Return how another run's stage can be used in this run."""
    there = recorded(source, stage)
    if source.result(stage) is None or there is None:
        return Found(source, "train", f"it is not finished in {source.path}")
    changed = there.differences(here)
    if not changed:
        return Found(source, "take")
    keys = differing(there.settings, here.settings)
    if len(changed) > 1 or not keys or not keys <= set(LENGTH):  # without keys, the data or the base changed
        return Found(source, "train", "; ".join(changed))
    section = recipe.section(stage)
    full = None if isinstance(section, Rl) else recipe.full_tuning.schedule
    name, warmup = full or section.lr_scheduler_type, section.warmup_ratio
    before, now = (length(one, stage) for one in (source.recipe(), recipe))
    if now < before:
        return Found(source, "train", f"{changed[0]}, which is less")
    if name != "constant" and (name not in FOR_ANY_LENGTH or warmup > 0):
        why = f"{changed[0]}, and its learning rate depends on the number of steps ({name}"
        why += f", warmup_ratio {warmup:g})" if name in FOR_ANY_LENGTH else ")"
        return Found(source, "train", f"{why}; {stage}.lr_scheduler_type: constant would allow continuing it")
    if isinstance(section, Rl) and (by := _by_share_of_steps(section)):
        return Found(source, "train", f"{changed[0]}, and {by} depends on the number of steps")
    if not source.has_checkpoint(stage):
        return Found(source, "train", f"{changed[0]}, and {source.path} has no checkpoint of it")
    return Found(source, "continue", changed[0])


def _by_share_of_steps(settings: Rl) -> str:
    """Return the setting that makes RL's steps depend on their total number; empty if none does."""
    if settings.prompt_sampling == "curriculum":
        return "the curriculum"
    return "length_reward_delay" if settings.length_reward and settings.length_reward_delay else ""


def length(recipe: Recipe, stage: StageName) -> int:
    """Return the epochs of a supervised stage or the steps of RL."""
    section = recipe.section(stage)
    return section.steps if isinstance(section, Rl) else section.epochs


def find_stages(
    recipe: Recipe, folder: RunFolder, identities: Mapping[StageName, Identity], source: Path | None
) -> dict[StageName, Found]:
    """Return what to reuse: from `source` the stages that fit, from a section's `from` that stage, which must fit.

    Stages that were started in this run's own folder are not replaced.

    Raises:
        UserError: a stage named by `from` does not fit, or a source is not a run folder.
    """
    found: dict[StageName, Found] = {}
    for stage, here in identities.items():
        named = getattr(getattr(recipe, stage), "from_", None)
        path = source if named is None else Path(named)
        if path is None or folder.begun(stage):
            continue
        if path.resolve() == folder.path.resolve():
            what = "a run cannot take stages from itself"
            raise UserError(what, where=f"--from {path}", remedy="Give another --out.")
        (other := RunFolder(path)).recipe()
        found[stage] = look_up(recipe, stage, here, other)
        if named is not None and found[stage].use != "take":
            raise UserError(
                f"{stage} does not fit: {found[stage].why}",
                where=f"{stage}.from: {named}",
                remedy=f"Remove the differing keys from the recipe, or {stage}.from to train the stage here.",
            )
    return found


def take(folder: RunFolder, stage: StageName, found: Found, main: bool) -> None:
    """Copy the reusable parts of a stage into this run, and print what happens to the stage."""
    source, why = escape(str(found.source.path)), escape(found.why)  # which may contain a pattern such as [/-]
    match found.use:
        case "take":
            console.print(f"[green]{stage}[/] is taken from {source}.")
        case "continue":
            console.print(f"[green]{stage}[/] is continued from {source}: {why}.")
        case "train":
            console.print(f"[yellow]{stage}[/] is trained again: {why}.")
            return
    roles, result = ROLES[stage], found.source.result(stage) if found.use == "take" else None
    if stage == "rl" and found.use == "take" and found.source.result("sft") is None:
        roles = (Role.SFT, *roles)  # RL started from an adapter that was trained elsewhere
    for role in roles if main else ():
        if (there := found.source.role(role)).is_dir():
            with whole_folder(folder.role(role)) as copy:
                _copy(there, copy, None if found.use == "take" else _UNFINISHED)
                if result is not None and role is STAGE_ROLE[stage]:
                    write_json(copy / "result.json", as_json(replace(result, reused_from=str(found.source.path))))


_UNFINISHED = ("checkpoints", "metrics.jsonl", "waited.json")
"""What is copied of a stage that is continued."""


def _copy(there: Path, copy: Path, names: Sequence[str] | None) -> None:
    """Copy a stage's folder, or only the files with these names."""
    for path in there.iterdir():
        if names is not None and path.name.startswith("member-"):
            (copy / path.name).mkdir()
            _copy(path, copy / path.name, names)
        elif names is not None and path.name not in names:
            continue
        elif path.is_dir():
            shutil.copytree(path, copy / path.name, copy_function=_link)
        else:  # no link: metrics.jsonl is appended to
            shutil.copy2(path, copy / path.name)


def _link(source: str, target: str) -> str:
    """Make a hard link if the disk supports it: weights and checkpoints are replaced, never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
