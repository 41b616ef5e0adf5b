"""`sweep`: one reward model for each rank and placement of its adapters, and under full tuning, over seeds.

The table is that of PERL's Table 2 (arXiv 2403.10704): what the reward model loses at a lower rank. The paper puts
adapters on attention projections; the other placement is all linear layers. α is the recipe's at every rank: with
the adapter's output scaled by α/r, one learning rate then suits all ranks (Schulman et al. 2025, "LoRA Without
Regret").
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    search_rates: Annotated[
        bool, typer.Option("--search-rates", help="Search each setting's learning rate, on a seed of its own.")
    ] = False,
) -> None:
    """Train the reward model at several ranks and placements of its adapters, and whole, over seeds."""
    loaded = load_recipe(recipe, overrides)
    rank_list, seed_list = _parse_list("--ranks", ranks, int), _parse_list("--seeds", seeds, int)
    target_list = _parse_list("--targets", targets, str)
    _check(loaded, rank_list, target_list, seed_list, full)
    folder = out or Path("runs") / f"{loaded.name}-sweep"
    with writing(folder):
        settings = [Setting(place, rank) for place in target_list for rank in sorted(rank_list)]
        settings += [Setting()] * full
        if search_rates:
            settings = [_searched(setting, loaded, max(seed_list) + 1, folder) for setting in settings]
        _sweep(loaded, folder, settings, seed_list)


@dataclass(frozen=True)
class Setting:
    """What is compared: adapters of one rank in one place, or full tuning (both None)."""

    targets: str | None = None
    rank: int | None = None
    rate: float | None = None
    """The learning rate; None: the recipe's, and a tenth of it under full tuning."""

    @property
    def name(self) -> str:
        """As in attention-r4, full, or full-lr0.0001."""
        name = "full" if self.targets is None else f"{self.targets}-r{self.rank}"
        return name if self.rate is None else f"{name}-lr{self.rate:g}"

    def folder(self, out: Path, seed: int) -> Path:
        """Of its run with this seed."""
        return out / f"{self.name}-{seed}"

    def recipe(self, recipe: Recipe, seed: int) -> Recipe:
        """The reward stage alone, with this setting."""
        alone = Recipe.model_validate(recipe.model_dump() | {"sft": None, "rl": None})
        content = variant(alone, "full" if self.targets is None else "lora", seed).model_dump()
        if self.targets is not None:
            content["lora"] |= {"targets": self.targets, "rank": self.rank}
        if self.rate is not None:
            content["reward"]["learning_rate"] = self.rate
        return Recipe.model_validate(content)


def _searched(setting: Setting, recipe: Recipe, seed: int, out: Path) -> Setting:
    """The setting with its best learning rate on this seed, which is not one of those that are reported."""
    from perl.measure.rate_search import search_rate
    from perl.report.runs import read_run
    from perl.runs.folder import RunFolder
    from perl.stages.training import NotFiniteError

    def score(rate: float) -> float:
        tried = replace(setting, rate=rate)
        folder = tried.folder(out, seed)
        RunFolder(folder).check(tried.recipe(recipe, seed))
        if not (folder / "report.json").exists():
            try:
                _run([tried], recipe, seed, out)
            except NotFiniteError:
                return -math.inf
        stage = read_run(folder).report.stages.reward
        assert stage is not None
        value = stage.eval.pairwise_accuracy if stage.eval.compared else stage.eval.auroc
        return -math.inf if value is None else value

    default = setting.recipe(recipe, seed).reward
    assert default is not None
    found = search_rate(score, default.learning_rate)
    beyond = "; it is at the edge of what was tried, and may lie beyond" if found.edge else ""
    console.print(f"[bold]{setting.name}[/]: learning rate {found.best:g}, searched on seed {seed}{beyond}")
    return replace(setting, rate=found.best)


def _sweep(recipe: Recipe, out: Path, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
    """Train every reward model that is not finished, print the table, write the page and sweep.json.

    Data and base are read once a seed, and once more for full tuning, which changes the base.
    """
    from perl.report import sweep as page
    from perl.report.runs import read_runs
    from perl.runs.folder import RunFolder

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
    for one in () if full else recipes:  # that each fits is known first
        adapters_for(one, material.lm)
    for setting, one in zip(settings, recipes, strict=True):
        console.print(f"[bold]{setting.name}, seed {seed}[/] in {setting.folder(out, seed)}")
        run(one, setting.folder(out, seed), material=material)


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
    for stage, folder in recipe.starts.items():
        what = f"the recipe starts {stage} from {folder}, which has a rank and placement of its own"
        raise UserError(what, where=f"{stage}.adapter", remedy="Take it out.")
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
