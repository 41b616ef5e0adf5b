"""`sweep`: one stage with several kinds, sizes and placements of adapters and with full tuning, over seeds.

All ranks use the recipe's α: with the adapter's output scaled by α/r, one learning rate then suits all of them
(Schulman et al. 2025, "LoRA Without Regret"); `--search-rates` does not rely on that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.table import Table

from perl.commands.options import Out, Overrides, RecipeFile, say_loading, writing
from perl.errors import UserError
from perl.recipe import Recipe, StageName, load_recipe
from perl.system.files import user_named, write_metrics
from perl.system.progress import console, counted

if TYPE_CHECKING:
    from perl.report.sweep import Sweep
    from perl.sweep.cells import Cells
    from perl.sweep.setting import Setting

T = TypeVar("T", str, int)
MOST_SEED = 2**32 - 1
"""Largest seed that a recipe accepts."""


def sweep(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    stage: Annotated[
        Literal["sft", "reward", "rl"], typer.Option("--stage", help="The stage to train and evaluate.")
    ] = "reward",
    kinds: Annotated[
        str | None,
        typer.Option(
            "--kinds",
            metavar="K,K",
            help="Kinds of adapters, and full; KIND:SIZE or KIND:SIZE@TARGETS fixes what the next options vary. "
            "By default the recipe's kind, and full.",
        ),
    ] = None,
    ranks: Annotated[
        str, typer.Option("--ranks", metavar="R,R", help="Ranks, or other sizes, of kinds that have them.")
    ] = "",
    targets: Annotated[
        str, typer.Option("--targets", metavar="T,T", help="Where adapters are placed, such as attention,mlp.")
    ] = "",
    equal_weights: Annotated[
        bool, typer.Option("--equal-weights", help="Give each setting about as many weights as the first.")
    ] = False,
    seeds: Annotated[str, typer.Option("--seeds", metavar="S,S", help="Seeds of every setting.")] = "0,1,2",
    search_rates: Annotated[
        bool, typer.Option("--search-rates", help="Search for each setting's learning rate, on separate seeds.")
    ] = False,
    search_seeds: Annotated[
        str, typer.Option("--search-seeds", metavar="S,S", help="Search seeds; by default the one after the last.")
    ] = "",
    kl: Annotated[
        float | None,
        typer.Option("--kl", min=0, help="Compare RL at this KL; by default the largest that all runs reached."),
    ] = None,
) -> None:
    """Train a stage with several kinds, sizes and placements of adapters, and with full tuning, over seeds."""
    loaded = load_recipe(recipe, overrides)
    say_loading()
    from perl.sweep.cells import Cells
    from perl.sweep.setting import FULL, parse_settings

    reported = _parse_list("--seeds", seeds, int)
    others = search_seeds or str(max(reported) + 1)
    searched_on = _parse_list("--search-seeds", others, int) if search_rates else []
    settings = parse_settings(
        _parse_list("--kinds", f"{loaded.adapter_kind},{FULL}" if kinds is None else kinds, str),
        _parse_list("--ranks", ranks, int) if ranks else [],
        _parse_list("--targets", targets, str) if targets else [],
    )
    _check(loaded, stage, settings, reported, searched_on)
    folder = out or Path("runs") / f"{loaded.name}-{stage}-sweep"
    with writing(folder):
        cells = Cells(loaded, stage, folder)
        cells.check(settings, [*searched_on, *reported])
        if equal_weights:
            settings = list(cells.equally_large(settings, reported[0]))
            cells.check(settings, [*searched_on, *reported])  # with a size they are different settings
        _sweep(cells, settings, reported, searched_on, kl)


def _sweep(
    cells: "Cells",
    settings: Sequence["Setting"],
    seeds: Sequence[int],
    searched_on: Sequence[int],
    kl: float | None,
) -> None:
    """Run one setting after the other; write page and sweep.json after each, so that they have complete rows."""
    from perl.report.sweep import Cell, Sweep, write_sweep
    from perl.sweep.rates import search

    rows: list[Cell] = []
    result: Sweep | None = None
    for setting in settings:
        found = search(cells, setting, searched_on, kl) if searched_on else None
        rated = setting if found is None else replace(setting, rate=found.best)
        runs = {seed: run for seed in seeds if (run := cells.run(rated, seed)) is not None}
        if not runs:
            console.print(f"[yellow]{setting.words}[/] is left out because its training diverged on every seed.")
            continue
        rows.append(Cell(rated, runs, found))
        result = Sweep(cells.recipe.name, cells.stage, tuple(seeds), tuple(searched_on), tuple(rows), kl)
        write_metrics(cells.out / "sweep.json", result.as_json())
        with user_named(cells.out):
            write_sweep(result, cells.out / "report.html")
    if result is not None:
        console.print(_table(result))
        for sentence in result.sentences:
            console.print(sentence, markup=False)
        console.print(f"Written: {cells.out}/report.html, sweep.json next to it, and the runs", markup=False)


def _parse_list(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """Parse a list such as `1,2,4`. Raises `UserError` if an entry is not of this kind, or repeated."""
    values: list[T] = []
    for entry in text.split(","):
        try:
            value = kind(entry.strip())
        except ValueError:
            raise UserError(f"{entry!r} is not a number", where=option, remedy="For example 1,2,4.") from None
        if value in values:
            raise UserError(f"{value} is given twice", where=option, remedy="Name each once.")
        values.append(value)
    return values


def _check(
    recipe: Recipe,
    stage: StageName,
    settings: Sequence["Setting"],
    seeds: Sequence[int],
    searched_on: Sequence[int],
) -> None:
    from perl.report.outcome import MIN_STEPS
    from perl.sweep.setting import FULL

    if stage not in recipe.stages:
        where, remedy = f"recipe {recipe.name}", f"Add `{stage}: {{}}` to it, or choose another --stage."
        raise UserError(f"the recipe has no section {stage}", where=where, remedy=remedy)
    if recipe.tuning == "full":
        remedy = f"Set tuning: lora, and {stage}.learning_rate to what suits LoRA: full tuning gets a tenth of it."
        raise UserError("the recipe is for full tuning", where="tuning", remedy=remedy)
    for started, folder in recipe.starts.items():
        what = f"the recipe starts {started} from {folder}, which has its own rank and placement"
        raise UserError(what, where=f"{started}.adapter", remedy="Remove it.")
    if recipe.base.quantization != "none" and any(one.kind == FULL for one in settings):
        what = "full tuning cannot train 4-bit weights"
        raise UserError(what, where="base.quantization", remedy="Leave it out: --kinds lora.")
    for option, numbers, least, most in (
        ("--ranks", [one.size for one in settings if one.size is not None], 1, None),
        ("--seeds", seeds, 0, MOST_SEED),
        ("--search-seeds", searched_on, 0, MOST_SEED),
    ):
        if wrong := [number for number in numbers if number < least]:
            raise UserError(f"{wrong[0]} is too small", where=option, remedy=f"The minimum is {least}.")
        if most is not None and max(numbers, default=0) > most:
            raise UserError(f"{max(numbers)} is too large", where=option, remedy=f"The maximum is {most}.")
    if both := set(seeds) & set(searched_on):
        what, remedy = f"{min(both)} is also a reported seed", "Search on seeds that are not among --seeds."
        raise UserError(what, where="--search-seeds", remedy=remedy)
    if stage == "rl" and recipe.rl is not None and recipe.rl.steps < MIN_STEPS:
        what = f"{counted(recipe.rl.steps, 'step')}: too few for a curve that can be read at one KL"
        raise UserError(what, where="rl.steps", remedy=f"Take at least {MIN_STEPS}.")


def _table(result: "Sweep") -> Table:
    """Build the table for the terminal; the page has the other metrics too."""
    left_out = {quality.name for quality in result.qualities[1:]}
    columns = {name: text for name, text in result.columns.items() if name not in left_out}
    over = f"mean ± half its 95 % interval over {len(result.seeds)} seed(s)"
    table = Table(*columns, title=f"{result.name}, {result.stage}: {over}", padding=(0, 1, 0, 0))
    for cell in result.cells:
        table.add_row(*(text(cell) for text in columns.values()))
    return table
