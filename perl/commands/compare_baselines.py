"""`compare --baselines`: RL on the reward model against KTO and DPO on the same ratings."""

import gc
import math
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from perl.errors import MachineError, UserError
from perl.recipe import Recipe
from perl.sweep.setting import variant
from perl.system.child import run_child
from perl.system.files import write_json, write_metrics, write_whole
from perl.system.progress import console, silence
from perl.system.signals import LEAVE
from perl.system.typed_json import as_json, read

if TYPE_CHECKING:
    from perl.baselines.results import BaselineResult


def parse_baselines(text: str) -> dict[str, float | None]:
    """Parse names with their learning rates, as in kto,dpo:3e-4; None: the reward model's rate.

    Raises:
        UserError: an unknown or repeated baseline, or an invalid rate.
    """
    from perl.baselines.training import BASELINES

    found: dict[str, float | None] = {}
    for entry in text.split(","):
        name, colon, rate = entry.strip().partition(":")
        if name not in BASELINES or name in found:
            what = f"{name!r} is repeated" if name in found else f"{name!r} is not one of {', '.join(BASELINES)}"
            raise UserError(what, where="--baselines", remedy="Name each at most once, as in kto or kto,dpo:3e-4.")
        try:
            found[name] = float(rate) if colon else None
        except ValueError:
            found[name] = math.nan
        if colon and not 0 < (found[name] or 0) <= 1:
            what = f"{rate!r} is not a learning rate"
            raise UserError(what, where=f"--baselines {entry}", remedy="Give a number above 0 and at most 1.")
    return found


def compare_baselines(recipe: Recipe, asked: Mapping[str, float | None], seeds: int, out: Path) -> None:
    """Run the recipe and the baselines on each seed, print the table, write the page and compare.json.

    Finished runs and baselines are not repeated.

    Raises:
        UserError: the recipe has no reward model or no RL, uses full tuning, or has no suitable ratings.
    """
    if recipe.reward is None or recipe.rl is None or recipe.tuning != "lora":
        what = "baselines are compared with RL on adapters against a reward model"
        remedy = "Use a recipe with the sections reward and rl, and tuning: lora."
        raise UserError(what, where="--baselines", remedy=remedy)
    from perl.baselines.comparison import check_baselines
    from perl.report.baselines import COLUMNS, table_rows, trainings
    from perl.report.page import write_page
    from perl.stages.auto_rates import learning_rate
    from perl.stages.opening import open_session

    folders = {seed: out / f"lora-{seed}" for seed in range(recipe.seed, recipe.seed + seeds)}
    with silence():
        session = open_session(recipe, folders[recipe.seed])
        check_baselines(session, list(asked))
    own = learning_rate(recipe, "reward", session.roles.models()[0].config)
    rates = {name: own if rate is None else rate for name, rate in asked.items()}
    results = [
        one for seed, folder in folders.items() for one in _of_seed(variant(recipe, "lora", seed), folder, rates)
    ]
    table = Table(*COLUMNS, title=f"{recipe.name}: RL against training on the ratings, at the same KL")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    for line in trainings(results):
        console.print(line, markup=False)
    write_metrics(out / "compare.json", {"name": recipe.name, "seeds": seeds, "baselines": as_json(results)})
    page = write_page(list(folders.values()), out / "report.html", results)
    console.print(f"Written: {page}, compare.json next to it, and the runs in {out}/", markup=False)


def _of_seed(recipe: Recipe, folder: Path, rates: Mapping[str, float]) -> "list[BaselineResult]":
    """Run the recipe and train each baseline, unless that is already done."""
    from perl.baselines.comparison import Judging
    from perl.stages.opening import open_session

    gc.collect()  # the previous seed's base: the run is a separate process
    console.print(f"[bold]seed {recipe.seed}[/] in {escape(str(folder))}")
    run_apart(recipe, folder)
    session, results = open_session(recipe, folder), []
    belongs, judging = session.identities["rl"].sha256, None
    for name, rate in rates.items():
        file = folder.with_name(f"{name}-{rate:g}-{recipe.seed}.json")
        if (found := _finished(file, belongs)) is None:
            console.print(f"[bold]{name}, seed {recipe.seed}[/]")
            judging = judging or Judging(session)
            found = judging.baseline(name, rate, belongs)
            write_json(file, as_json(found))
        results.append(found)
    return results


def _finished(file: Path, belongs: str) -> "BaselineResult | None":
    """Return the result of an earlier call, if it belongs to the same run."""
    from perl.baselines.results import BaselineResult

    found = read(BaselineResult, file, "Remove it to train it again.")
    return found if found is not None and found.belongs == belongs else None


def run_apart(recipe: Recipe, folder: Path) -> None:
    """Run a recipe in a separate process, for its peak memory; finished stages are not repeated.

    Raises:
        MachineError: a signal ended that process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        write_whole(file, recipe.to_yaml())
        status = run_child([sys.executable, "-m", "perl", "run", str(file), "--out", str(folder)])
    if -status in LEAVE:
        raise KeyboardInterrupt  # it was still starting
    if status < 0:
        raise MachineError(
            f"the run was ended by {signal.Signals(-status).name}",
            where=str(folder),
            remedy="The system does that with SIGKILL when memory runs out: `perl-rlhf estimate` shows what the "
            "recipe needs. Run the same command again: it continues where this run was saved.",
        )
    if status:
        raise SystemExit(status)  # it has printed why
