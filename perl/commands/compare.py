"""`compare`: the same recipe under LoRA and under full tuning, side by side."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from perl.commands.options import Out, Overrides, RecipeFile, writing
from perl.recipe import Recipe, StageName, load_recipe
from perl.system.files import user_named, write_json, write_metrics, write_whole
from perl.system.progress import console
from perl.system.typed_json import as_json

if TYPE_CHECKING:
    from perl.predict import Memory
    from perl.report.tunings import CostRow, QualityRow

FULL_LEARNING_RATE = 0.1
"""Of LoRA's, whose best one is about ten times full tuning's (Schulman et al. 2025, "LoRA Without Regret")."""
TUNINGS = ("lora", "full")
COLUMNS = ("stage", "figure", "LoRA", "full tuning", "LoRA / full")


def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Runs of each tuning.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=3, help="Measure memory and speed alone, over N steps a stage."),
    ] = None,
) -> None:
    """Run the recipe under LoRA and under full tuning: memory, speed and quality side by side."""
    loaded = load_recipe(recipe, overrides)
    folder = out or Path("runs") / f"{loaded.name}-compare"
    with writing(folder):
        if steps is not None:
            _compare_costs(loaded, steps, folder)
        else:
            _compare_runs(loaded, folder, seeds)


def variant(recipe: Recipe, tuning: str, seed: int) -> Recipe:
    """The recipe under another tuning: full tuning at a tenth of the learning rates, with a critic of its own."""
    content = recipe.model_dump()
    if tuning == "full" and recipe.tuning == "lora":
        for stage in recipe.stages:
            if content[stage]["learning_rate"] != "auto":  # which follows the tuning by itself
                content[stage]["learning_rate"] *= FULL_LEARNING_RATE
        if content["rl"] is not None and content["rl"]["critic"] == "shared":
            content["rl"]["critic"] = None
    if recipe.rl is not None and recipe.rl.sampler.kind == "server":  # which full tuning has no adapters for
        content["rl"]["sampler"] = {}
    return Recipe.model_validate(content | {"tuning": tuning, "seed": seed})


def _compare_runs(recipe: Recipe, out: Path, seeds: int) -> None:
    """Run all stages under both tunings, print the table, write the page and compare.json.

    Every run is a process, for its peak memory; finished ones are not repeated.
    """
    from perl.predict import predict, read_subject
    from perl.report.outcome import match_all
    from perl.report.page import write_page
    from perl.report.runs import groups, read_runs
    from perl.report.tunings import cost_rows, quality_rows

    folders, subject = [], read_subject(recipe)
    predicted = {tuning: predict(variant(recipe, tuning, recipe.seed), subject) for tuning in TUNINGS}
    for seed in range(recipe.seed, recipe.seed + seeds):
        for tuning in TUNINGS:
            folder = out / f"{tuning}-{seed}"
            console.print(f"[bold]{tuning}, seed {seed}[/] in {folder}")
            _run(variant(recipe, tuning, seed), folder)
            _note(folder, predicted[tuning])
            folders.append(folder)
    lora, full = groups(read_runs(folders))
    costs, qualities = cost_rows(lora, full), quality_rows(lora, full, match_all([lora, full]))
    table = Table(*COLUMNS, title=f"{recipe.name}, {seeds} seed(s)")
    for row in costs:
        table.add_row(row.stage, row.metric, *row.cells)
    for quality in qualities:
        table.add_row("quality", quality.metric, *quality.cells)
    console.print(table)
    rows = [{"stage": row.stage.lower(), "figure": row.metric, **_means(row)} for row in costs]
    rows += [{"stage": "quality", "figure": quality.metric, **_means(quality)} for quality in qualities]
    write_metrics(out / "compare.json", {"name": recipe.name, "seeds": seeds, "rows": rows})
    page = write_page(folders, out / "report.html")
    console.print(f"Written: {page}, compare.json beside it, and the runs in {out}/")


def _compare_costs(recipe: Recipe, steps: int, out: Path) -> None:
    """Measure memory and speed alone, over so many steps of each stage on the longest rows; write compare.json."""
    from perl.predict import TRY, Trial, trial_session
    from perl.report.numbers import bytes_text, rate_text

    table = Table(*COLUMNS, title=f"{recipe.name}, {steps} steps a stage")
    rows = []
    for stage in recipe.stages:
        results = []
        for tuning in TUNINGS:
            console.print(f"{stage}, {tuning}")
            with trial_session(variant(recipe, tuning, recipe.seed), Trial(steps)) as session:
                results.append(TRY[stage](session))
        for figure, text in (("peak_memory_bytes", bytes_text), ("tokens_per_second", rate_text)):
            lora, full = (getattr(result, figure) for result in results)
            table.add_row(stage, figure.replace("_", " "), text(lora), text(full), f"{lora / full:.2f}")
            rows.append({"stage": stage, "figure": figure, "lora": lora, "full": full, "ratio": lora / full})
    console.print(table)
    with user_named(out):
        out.mkdir(parents=True, exist_ok=True)
    write_metrics(out / "compare.json", {"name": recipe.name, "steps": steps, "rows": rows})


def _means(row: "CostRow | QualityRow") -> dict[str, float]:
    return {"lora": row.lora.mean, "full": row.full.mean}


def _run(recipe: Recipe, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        write_whole(file, recipe.to_yaml())
        done = subprocess.run([sys.executable, "-m", "perl", "run", str(file), "--out", str(folder)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why


def _note(folder: Path, predicted: "dict[StageName, Memory]") -> None:
    """Put the predictions beside what was measured."""
    file = folder / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    for stage, memory in predicted.items():
        report["stages"][stage]["predicted_memory"] = as_json(memory)
    write_json(file, report)
