"""`sweep`: one reward model for each rank and placement of its adapters, and under full tuning, over seeds.

The table is that of PERL's Table 2 (arXiv 2403.10704): what the reward model loses at a lower rank. The paper puts
adapters on attention projections; the other placement is all linear layers. α is the recipe's at every rank: with
the adapter's output scaled by α/r, one learning rate then suits all ranks (Schulman et al. 2025, "LoRA Without
Regret").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Table

from perl.commands.compare import variant
from perl.commands.options import Out, Overrides, RecipeFile, one_of, writing
from perl.errors import UserError
from perl.recipe import Recipe, load_recipe
from perl.system.files import user_named, write_metrics
from perl.system.progress import console

if TYPE_CHECKING:
    from perl.report.sweep import Sweep

TARGETS = ("attention", "all-linear")
T = TypeVar("T", str, int)


def sweep(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    ranks: Annotated[str, typer.Option("--ranks", metavar="R,R", help="Ranks of the adapters.")] = "1,2,4,8,16",
    targets: Annotated[
        str, typer.Option("--targets", metavar="T,T", help="Where they are: attention, all-linear.")
    ] = "attention,all-linear",
    seeds: Annotated[str, typer.Option("--seeds", metavar="S,S", help="Seeds of every setting.")] = "0,1,2",
    full: Annotated[bool, typer.Option("--full/--no-full", help="Full tuning beside them.")] = True,
) -> None:
    """Train the reward model at several ranks and placements of its adapters, and whole, over seeds."""
    loaded = load_recipe(recipe, overrides)
    rank_list, seed_list = _parse_list("--ranks", ranks, int), _parse_list("--seeds", seeds, int)
    target_list = _parse_list("--targets", targets, str)
    _check(loaded, rank_list, target_list, seed_list, full)
    folder = out or Path("runs") / f"{loaded.name}-sweep"
    with writing(folder):
        _sweep(loaded, folder, rank_list, target_list, seed_list, full)


@dataclass(frozen=True)
class Setting:
    """What is compared: adapters of one rank in one place, or full tuning (both None)."""

    targets: str | None = None
    rank: int | None = None

    @property
    def name(self) -> str:
        """As in attention-r4, or full."""
        return "full" if self.targets is None else f"{self.targets}-r{self.rank}"

    def folder(self, out: Path, seed: int) -> Path:
        """Of its run with this seed."""
        return out / f"{self.name}-{seed}"

    def recipe(self, recipe: Recipe, seed: int) -> Recipe:
        """The reward stage alone, with this setting."""
        alone = Recipe.model_validate(recipe.model_dump() | {"sft": None, "rl": None})
        if self.targets is None:
            return variant(alone, "full", seed)
        assert recipe.lora is not None
        lora = recipe.lora.model_dump() | {"targets": self.targets, "rank": self.rank}
        return Recipe.model_validate(alone.model_dump() | {"lora": lora, "seed": seed})


def _sweep(
    recipe: Recipe, out: Path, ranks: Sequence[int], targets: Sequence[str], seeds: Sequence[int], full: bool
) -> None:
    """Train every reward model that is not finished, print the table, write the page and sweep.json.

    Data and base are read once a seed, and once more for full tuning, which changes the base.
    """
    from perl.report import sweep as page
    from perl.report.runs import read_runs
    from perl.runs.folder import RunFolder

    settings = [Setting(place, rank) for place in targets for rank in sorted(ranks)] + [Setting()] * full
    for seed in seeds:
        for setting in settings:
            RunFolder(setting.folder(out, seed)).check(setting.recipe(recipe, seed))
    for seed in seeds:
        waiting = [one for one in settings if not (one.folder(out, seed) / "report.json").exists()]
        for together in ([one for one in waiting if one.targets], [one for one in waiting if not one.targets]):
            if together:
                _run(together, recipe, seed, out)
    cells = [
        page.Cell(setting.targets, setting.rank, tuple(read_runs(setting.folder(out, seed) for seed in seeds)))
        for setting in settings
    ]
    result = page.Sweep(recipe.name, tuple(cells))
    console.print(_table(result))
    write_metrics(out / "sweep.json", result.as_json())
    with user_named(out):
        file = page.write_sweep(result, out / "report.html")
    console.print(f"Written: {file}, sweep.json beside it, and the runs in {out}/")


def _run(settings: Sequence[Setting], recipe: Recipe, seed: int, out: Path) -> None:
    """Runs of one seed on one base, which adapters leave unchanged; full tuning runs alone."""
    from perl.stages.material import read_material
    from perl.stages.pipeline import run
    from perl.stages.session import adapters_for

    recipes = [setting.recipe(recipe, seed) for setting in settings]
    material = read_material(recipes[0])
    full = settings[0].targets is None
    adapters = [] if full else [adapters_for(one, material.lm) for one in recipes]  # that each fits is known first
    for index, (setting, one) in enumerate(zip(settings, recipes, strict=True)):
        console.print(f"[bold]{setting.name}, seed {seed}[/] in {setting.folder(out, seed)}")
        run(one, setting.folder(out, seed), material=material)
        if not full:
            adapters[index].remove()


def _parse_list(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The entries of a list such as `1,2,4`. Raises `UserError` if one is not of this kind, or there twice."""
    values: list[T] = []
    for entry in text.split(","):
        try:
            value = kind(entry.strip())
        except ValueError:
            raise UserError(f"{entry!r} is not a number", where=option, remedy="For example 1,2,4.") from None
        if value in values:
            raise UserError(f"{value} is there twice", where=option, remedy="Name each once.")
        values.append(value)
    return values


def _check(recipe: Recipe, ranks: Sequence[int], targets: Sequence[str], seeds: Sequence[int], full: bool) -> None:
    if recipe.reward is None:
        where, remedy = f"recipe {recipe.name}", "Add `reward: {}` to it."
        raise UserError("the recipe has no section reward", where=where, remedy=remedy)
    if recipe.tuning == "full":
        remedy = "Set tuning: lora, and reward.learning_rate to what suits LoRA: full tuning gets a tenth of it."
        raise UserError("the recipe is one for full tuning", where="tuning", remedy=remedy)
    if recipe.lora is None:
        what = f"the recipe has adapters of kind {recipe.adapter_kind}, and ranks are LoRA's"
        raise UserError(what, where="adapter", remedy="Set lora in the place of adapter.")
    if full and recipe.base.quantization != "none":
        what = "full tuning cannot train 4-bit weights"
        raise UserError(what, where="base.quantization", remedy="Leave full tuning out: --no-full.")
    for option, numbers, least in (("--ranks", ranks, 1), ("--seeds", seeds, 0)):
        if wrong := [number for number in numbers if number < least]:
            raise UserError(f"{wrong[0]} is too small", where=option, remedy=f"The least is {least}.")
    for place in targets:
        one_of("--targets", place, list(TARGETS))


def _table(result: "Sweep") -> Table:
    """What a terminal has room for; the page has the other metrics."""
    from perl.report.sweep import QUALITIES

    left_out = {QUALITIES[key][0] for key in result.keys[1:]} | {"time"}
    columns = {name: text for name, text in result.columns.items() if name not in left_out}
    title = f"{result.name}: mean ± standard deviation over {result.seeds} seed(s)"
    table = Table(*columns, title=title, padding=(0, 1, 0, 0))
    for cell in result.cells:
        table.add_row(*(text(cell) for text in columns.values()))
    return table
