"""`run`, `sft`, `reward` and `rl`: the stages of a recipe, or one of them."""

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from perl.commands.options import Out, Overrides, RecipeFile, say_loading, writing
from perl.errors import UserError
from perl.parallel.launcher import ranks
from perl.recipe import Recipe, StageName, load_recipe

From = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="RUN", help="Reuse the stages of this run that still fit, and say why others do not."
    ),
]


def run(recipe: RecipeFile, overrides: Overrides = None, out: Out = None, source: From = None) -> None:
    """Run the recipe's stages in order; called again, continue with the first unfinished one."""
    _run(recipe, overrides, out, source)


def sft(recipe: RecipeFile, overrides: Overrides = None, out: Out = None, source: From = None) -> None:
    """Supervised fine-tuning on demonstrations."""
    _run(recipe, overrides, out, source, "sft")


def reward(recipe: RecipeFile, overrides: Overrides = None, out: Out = None, source: From = None) -> None:
    """Train the reward model on thumbs or pairs."""
    _run(recipe, overrides, out, source, "reward")


def rl(recipe: RecipeFile, overrides: Overrides = None, out: Out = None, source: From = None) -> None:
    """Train the policy against the reward."""
    _run(recipe, overrides, out, source, "rl")


def _run(
    file: Path, overrides: list[str] | None, out: Path | None, source: Path | None, stage: StageName | None = None
) -> None:
    recipe = load_recipe(file, overrides)
    if not ranks()[0]:
        say_loading(f"{recipe.name}: {', '.join([stage] if stage else recipe.stages)}. ")
    from perl.library import run

    folder = out or _new_folder(recipe, source)
    with writing(folder):
        run(recipe, folder, [stage] if stage else None, source)


def _new_folder(recipe: Recipe, source: Path | None) -> Path:
    """Return runs/NAME; if stages of another run are reused, the first usable one of runs/NAME-2, -3, …"""
    first = folder = Path("runs") / recipe.name
    numbers = count(2)
    while source is not None and not _can_be(folder, recipe, source):
        folder = first.with_name(f"{first.name}-{next(numbers)}")
    return folder


def _can_be(folder: Path, recipe: Recipe, source: Path) -> bool:
    """Return whether a folder is not the one whose stages are reused, and has no other recipe's run."""
    from perl.runs.folder import RunFolder

    try:
        RunFolder(folder).check(recipe)
    except UserError:
        return False
    return folder.resolve() != source.resolve()
