"""`run`, `sft`, `reward` and `rl`: the stages of a recipe, or one of them."""

from pathlib import Path

from perl.commands.options import Out, Overrides, RecipeFile, writing
from perl.recipe import StageName, load_recipe


def run(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Run the recipe's stages in order; called again, go on with the first unfinished one."""
    _run(recipe, overrides, out)


def sft(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Supervised fine-tuning on demonstrations."""
    _run(recipe, overrides, out, "sft")


def reward(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Train the reward model on thumbs or pairs."""
    _run(recipe, overrides, out, "reward")


def rl(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Train the policy against the reward."""
    _run(recipe, overrides, out, "rl")


def _run(file: Path, overrides: list[str] | None, out: Path | None, stage: StageName | None = None) -> None:
    recipe = load_recipe(file, overrides)
    from perl.library import run

    folder = out or Path("runs") / recipe.name
    with writing(folder):
        run(recipe, folder, [stage] if stage else None)
