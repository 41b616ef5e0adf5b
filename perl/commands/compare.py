"""`compare`: the same recipe under LoRA and under full tuning, side by side."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from perl.commands.compare_baselines import compare_baselines, parse_baselines, run_apart
from perl.commands.options import Out, Overrides, RecipeFile, say_loading, writing
from perl.data.fingerprint import sha256_of
from perl.errors import UserError
from perl.recipe import Recipe, StageName, load_recipe
from perl.recipe.adapter import adapter_label
from perl.sweep.setting import FULL, Setting, variant
from perl.system.files import user_named, write_json, write_metrics
from perl.system.progress import console, counted, silence
from perl.system.typed_json import as_json

if TYPE_CHECKING:
    from perl.predict import Memory
    from perl.report.tunings import CostRow, QualityRow

TUNINGS = ("lora", "full")
STEADY = 20
"""Number of steps from which the speed is shown without a caveat."""
COSTS = ("peak_memory_bytes", "tokens_per_second")
STEPS = "steps.json"
"""File of the measurements made before an interruption."""


def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Runs of each tuning.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=3, help="Measure only memory and speed, over N steps per stage."),
    ] = None,
    search_rates: Annotated[
        bool,
        typer.Option("--search-rates", help="Search for both sides' learning rates, on a separate seed."),
    ] = False,
    baselines: Annotated[
        str | None,
        typer.Option(
            "--baselines",
            metavar="NAME[:RATE],…",
            help="Compare RL with kto or dpo on the same ratings instead, at the same KL.",
        ),
    ] = None,
) -> None:
    """Run the recipe under LoRA and under full tuning: memory, speed and quality side by side."""
    loaded = load_recipe(recipe, overrides)
    if loaded.starts and baselines is None:
        key = f"{next(iter(loaded.starts))}.adapter"
        what = "full tuning would start from the base but LoRA from an adapter, which is no fair comparison"
        raise UserError(what, where=key, remedy=f"Remove {key}.")
    if baselines is not None and (steps is not None or search_rates):
        what, remedy = "--baselines compares policies, at given learning rates", "Leave the other option out."
        raise UserError(what, where="--baselines", remedy=remedy)
    if steps is not None and search_rates:
        what, remedy = "memory and speed do not depend on the learning rate", "Leave one of the two out."
        raise UserError(what, where="--steps, --search-rates", remedy=remedy)
    say_loading()
    folder = out or Path("runs") / f"{loaded.name}-compare"
    with writing(folder):
        if baselines is not None:
            compare_baselines(loaded, parse_baselines(baselines), seeds, folder)
            return
        if steps is not None:
            _compare_costs(loaded, steps, folder)
            return
        searched_on = loaded.seed + seeds if search_rates else None
        rates = {} if searched_on is None else _searched_rates(loaded, searched_on, folder / "rates")
        _compare_runs(loaded, folder, seeds, rates, searched_on)


def _searched_rates(recipe: Recipe, seed: int, out: Path) -> dict[str, dict[StageName, float]]:
    """Search the best learning rate of each stage under both tunings; RL starts from LoRA's stages under both."""
    from perl.sweep.cells import Cells
    from perl.sweep.rates import search

    rates: dict[str, dict[StageName, float]] = {tuning: {} for tuning in TUNINGS}
    for stage in recipe.stages:
        cells = Cells(variant(recipe, "lora", seed, rates["lora"]), stage, out / stage)
        settings = {"lora": Setting(recipe.adapter_kind), "full": Setting(FULL)}
        cells.check(list(settings.values()), [seed])
        for tuning, setting in settings.items():
            rates[tuning][stage] = search(cells, setting, [seed]).best
    return rates


def _compare_runs(
    recipe: Recipe,
    out: Path,
    seeds: int,
    rates: Mapping[str, Mapping[StageName, float]],
    searched_on: int | None,
) -> None:
    """Run all stages under both tunings, print the table, write the page and compare.json.

    Every run is a separate process, for its peak memory; finished runs are not repeated.

    Args:
        rates: learning rates by tuning and stage; where one is missing, full tuning uses a tenth of LoRA's.
        searched_on: the seed used for the search; None: there was no search.
    """
    from perl.predict import predict, read_subject
    from perl.report.outcome import match_all
    from perl.report.page import write_page
    from perl.report.runs import groups, read_runs
    from perl.report.tunings import cost_rows, quality_rows

    folders, subject = [], read_subject(recipe)
    recipes = {tuning: variant(recipe, tuning, recipe.seed, rates.get(tuning)) for tuning in TUNINGS}
    predicted = {tuning: predict(one, subject) for tuning, one in recipes.items()}
    for seed in range(recipe.seed, recipe.seed + seeds):
        for tuning, one in recipes.items():
            folder = out / f"{tuning}-{seed}"
            console.print(f"[bold]{tuning}, seed {seed}[/] in {escape(str(folder))}")
            run_apart(one.model_copy(update={"seed": seed}), folder)
            _note(folder, predicted[tuning])
            folders.append(folder)
    lora, full = groups(read_runs(folders))
    costs, qualities = cost_rows(lora, full), quality_rows(lora, full, match_all([lora, full]))
    table = _table(recipe, counted(seeds, "seed"))
    for row in costs:
        table.add_row(row.stage, row.metric, *row.cells)
    for quality in qualities:
        table.add_row("quality", quality.metric, *quality.cells)
    console.print(table)
    used = {
        tuning: {name: rate for name, stage in group.first.stages.items() if (rate := stage.learning_rate)}
        for tuning, group in zip(TUNINGS, (lora, full), strict=True)
    }
    _say_rates(adapter_label(recipe.adapter_kind), used, searched_on)
    rows = [{"stage": row.stage.lower(), "figure": row.metric, **_means(row)} for row in costs]
    rows += [{"stage": "quality", "figure": quality.metric, **_means(quality)} for quality in qualities]
    write_metrics(
        out / "compare.json",
        {
            "name": recipe.name,
            "seeds": seeds,
            "learning_rates": used,
            "rates_searched_on": searched_on,
            "rows": rows,
        },
    )
    page = write_page(folders, out / "report.html")
    console.print(f"Written: {page}, compare.json next to it, and the runs in {out}/", markup=False)


def _say_rates(kind: str, used: Mapping[str, Mapping[StageName, float]], searched_on: int | None) -> None:
    how = "by the recipe, with a tenth for full tuning by assumption (--search-rates searches for both)"
    if searched_on is not None:
        how = f"searched for on both sides, with seed {searched_on}, which is not reported"
    lora, full = (used[tuning] for tuning in TUNINGS)
    pairs = [f"{stage} {lora[stage]:g} and {full[stage]:g}" for stage in lora if stage in full]
    console.print(f"Learning rates: {how}; those of {kind} and full tuning are {', '.join(pairs)}.")


def _compare_costs(recipe: Recipe, steps: int, out: Path) -> None:
    """Measure only memory and speed, over some steps of each stage on the longest rows; write compare.json."""
    from perl.report.numbers import bytes_text, rate_text

    found = _measure(recipe, steps, out)
    table, rows = _table(recipe, f"{counted(steps, 'step')} per stage"), []
    for stage in recipe.stages:
        for cost, text in zip(COSTS, (bytes_text, rate_text), strict=True):
            lora, full = (found[f"{stage}, {tuning}"][cost] for tuning in TUNINGS)
            doubtful = " (few steps)" if cost == "tokens_per_second" and steps < STEADY else ""
            ratio = f"{lora / full:.2f}{doubtful}"
            table.add_row(stage, cost.replace("_", " "), text(lora), text(full), ratio)
            rows.append({"stage": stage, "figure": cost, "lora": lora, "full": full, "ratio": lora / full})
    console.print(table)
    if steps < STEADY:
        console.print(
            f"[yellow]{counted(steps, 'step')} are too few to measure speed[/], because the first ones prepare "
            f"memory and threads. Use --steps {STEADY} or more; the memory is valid."
        )
    write_metrics(out / "compare.json", {"name": recipe.name, "steps": steps, "rows": rows})
    (out / STEPS).unlink()


def _measure(recipe: Recipe, steps: int, out: Path) -> dict[str, dict[str, float]]:
    """Measure the costs of each stage under each tuning.

    Those that an interrupted command measured are read, if it had the same recipe, data and number of steps.
    """
    from perl.predict import TRY, Trial, trial_session
    from perl.stages.material import read_data

    with silence():
        data = read_data(recipe)
    begun = {"recipe": recipe.to_yaml(), "data": sha256_of(data, data[0].by_kind()), "steps": steps}
    found: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((out / STEPS).read_text(encoding="utf-8"))
        found = before.pop("found") if before.keys() > begun.keys() and before | begun == before else {}
    with user_named(out):
        out.mkdir(parents=True, exist_ok=True)
    for stage in recipe.stages:
        for tuning in TUNINGS:
            name = f"{stage}, {tuning}"
            console.print(f"{name}, measured before" if name in found else name)
            if name not in found:
                with trial_session(variant(recipe, tuning, recipe.seed), Trial(steps)) as session:
                    result = TRY[stage](session)
                found[name] = {cost: getattr(result, cost) for cost in COSTS}
                write_json(out / STEPS, begun | {"found": found})
    return found


def _table(recipe: Recipe, what: str) -> Table:
    kind = adapter_label(recipe.adapter_kind)
    return Table("stage", "figure", kind, "full tuning", f"{kind} / full", title=f"{recipe.name}, {what}")


def _means(row: "CostRow | QualityRow") -> dict[str, float]:
    return {"lora": row.lora.mean, "full": row.full.mean}


def _note(folder: Path, predicted: "dict[StageName, Memory]") -> None:
    """Add the predictions to the measured report."""
    file = folder / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    for stage, memory in predicted.items():
        report["stages"][stage]["predicted_memory"] = as_json(memory)
    write_json(file, report)
