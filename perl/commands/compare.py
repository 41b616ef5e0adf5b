"""`compare`: the same recipe under LoRA and under full tuning, side by side."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from perl.commands.run import TRAIN
from perl.predict import Memory, predict, read_subject
from perl.predict_rl import try_rl
from perl.recipe import Recipe, StageName
from perl.report.numbers import bytes_text, rate_text
from perl.report.outcome import match_all
from perl.report.page import write_page
from perl.report.runs import groups, read_runs
from perl.report.tunings import CostRow, QualityRow, cost_rows, quality_rows
from perl.results import Stage
from perl.stages.session import Trial, trial_session
from perl.system.files import user_named, write_json, write_metrics, write_whole
from perl.system.progress import console
from perl.system.typed_json import as_json

FULL_LEARNING_RATE = 0.1
"""Of LoRA's, whose best one is about ten times full tuning's (Schulman et al. 2025, "LoRA Without Regret")."""
TUNINGS = ("lora", "full")
COLUMNS = ("stage", "figure", "LoRA", "full tuning", "LoRA / full")


def variant(recipe: Recipe, tuning: str, seed: int) -> Recipe:
    """The recipe under another tuning: full tuning at a tenth of the learning rates, with a critic of its own."""
    content = recipe.model_dump()
    if tuning == "full" and recipe.tuning == "lora":
        for stage in recipe.stages:
            if content[stage]["learning_rate"] != "auto":  # which follows the tuning by itself
                content[stage]["learning_rate"] *= FULL_LEARNING_RATE
        if content["rl"] is not None and content["rl"]["critic"] == "shared":
            content["rl"]["critic"] = None
    return Recipe.model_validate(content | {"tuning": tuning, "seed": seed})


def compare(recipe: Recipe, out: Path, seeds: int) -> None:
    """Run all stages under both tunings, print the table and write the page.

    Every run is a process of its own, so that its peak memory is its own; a finished one is not repeated.

    Args:
        recipe: with the settings for LoRA.
        out: the folder of all the runs, of the page and of compare.json.
        seeds: how many, from the recipe's on.

    Raises:
        UserError: as `perl-rlhf run`.
    """
    folders = []
    predicted = {tuning: _predicted(variant(recipe, tuning, recipe.seed)) for tuning in TUNINGS}
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


def compare_costs(recipe: Recipe, steps: int, out: Path) -> None:
    """Measure memory and speed alone, over so many steps of each stage on the longest rows; write compare.json."""
    table = Table(*COLUMNS, title=f"{recipe.name}, {steps} steps a stage")
    rows = []
    for stage in recipe.stages:
        results = []
        for tuning in TUNINGS:
            console.print(f"{stage}, {tuning}")
            results.append(_tried(variant(recipe, tuning, recipe.seed), stage, steps))
        for figure, text in (("peak_memory_bytes", bytes_text), ("tokens_per_second", rate_text)):
            lora, full = (getattr(result, figure) for result in results)
            table.add_row(stage, figure.replace("_", " "), text(lora), text(full), f"{lora / full:.2f}")
            rows.append({"stage": stage, "figure": figure, "lora": lora, "full": full, "ratio": lora / full})
    console.print(table)
    with user_named(out):
        out.mkdir(parents=True, exist_ok=True)
    write_metrics(out / "compare.json", {"name": recipe.name, "steps": steps, "rows": rows})


def _tried(recipe: Recipe, stage: StageName, steps: int) -> Stage:
    with trial_session(recipe, Trial(steps)) as session:
        return try_rl(session) if stage == "rl" else TRAIN[stage](session)


def _means(row: CostRow | QualityRow) -> dict[str, float]:
    return {"lora": row.lora.mean, "full": row.full.mean}


def _predicted(recipe: Recipe) -> dict[StageName, Memory]:
    return predict(recipe, read_subject(recipe))


def _run(recipe: Recipe, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        write_whole(file, recipe.to_yaml())
        done = subprocess.run([sys.executable, "-m", "perl", "run", str(file), "--out", str(folder)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why


def _note(folder: Path, predicted: dict[StageName, Memory]) -> None:
    """Put the predictions beside what was measured."""
    file = folder / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    for stage, memory in predicted.items():
        report["stages"][stage]["predicted_memory"] = as_json(memory)
    write_json(file, report)
