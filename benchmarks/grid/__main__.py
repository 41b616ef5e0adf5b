"""`python -m benchmarks.grid` runs the cells that are not finished and writes the tables."""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.grid.cell import ALGORITHMS, REWARDS, Plan
from benchmarks.grid.facts import learn_facts
from benchmarks.grid.models import LLAMA, MODELS, ROOT, model_folder
from benchmarks.grid.table import line, write_tables
from perl.system.allocator import keep_freed_memory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description="See benchmarks/README.md.")

    def several(option: str, default: str, known: Sequence[str] | None = None) -> None:
        words = f"Any of {', '.join(known)}; {default} by default." if known else f"{default} by default."
        parser.add_argument(option, default=default, metavar="A,B", type=str, help=words)

    several("--models", ",".join(MODELS), MODELS)
    several("--rewards", ",".join(REWARDS), REWARDS)
    several("--scales", "0.01,1,100")
    several("--algorithms", "default", list(ALGORITHMS))
    several("--seeds", "0")
    parser.add_argument("--steps", type=int, default=80, metavar="N", help="RL steps; 80 by default.")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="48 by default.")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Set in every recipe.")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="Concurrent cells; 1 by default.")
    parser.add_argument("--out", type=Path, default=Path("runs/grid"), metavar="DIR", help="runs/grid by default.")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/grid-cache"), metavar="DIR", help="Models and ratings."
    )
    parser.add_argument("--llama", type=Path, default=LLAMA, metavar="DIR", help="The 656K Llama.")
    return parser


def _split(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str] | None) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if known is not None and part not in known:
            parser.error(f"{option} has {part!r}, which is not one of {', '.join(known)}")
    return parts


def main() -> None:
    """Plan the cells, run those that are not finished, and write the tables."""
    parser = _parser()
    given = parser.parse_args()
    models = _split(parser, "--models", given.models, MODELS)
    rewards = _split(parser, "--rewards", given.rewards, REWARDS)
    scales = _split(parser, "--scales", given.scales, None)
    algorithms = _split(parser, "--algorithms", given.algorithms, list(ALGORITHMS))
    seeds = _split(parser, "--seeds", given.seeds, None)
    if not given.llama.is_dir():
        parser.error(f"--llama {given.llama}: no such folder")

    keep_freed_memory()
    torch.set_num_threads(1)  # several threads that wait for each other are slow on a shared machine
    facts = {}
    for model in models:
        folder = model_folder(model, given.cache, given.llama).resolve()
        facts[model] = folder, *learn_facts(model, folder, given.cache, given.max_new_tokens)
    plans = [
        Plan(
            model=model,
            reward=reward,
            scale=scale,
            algorithm=algorithm,
            seed=int(seed),
            steps=given.steps,
            max_new_tokens=given.max_new_tokens,
            overrides=given.set,
            base=str(facts[model][0]),
            ratings=str(facts[model][2].resolve()),
            facts=asdict(facts[model][1]),
        )
        # Scales vary fastest, so that cells to be compared finish early.
        for model, reward, algorithm, seed, scale in itertools.product(models, rewards, algorithms, seeds, scales)
    ]
    _run_all(plans, given.out, given.jobs)
    results = [found for plan in plans if (found := _finished(plan, given.out)) is not None]
    print(f"\n{write_tables(results, given.out)}")


def _run_all(plans: list[Plan], out: Path, jobs: int) -> None:
    """Run the cells that are not finished, `jobs` at a time, and print one line for each when it ends."""
    todo = [plan for plan in plans if _finished(plan, out) is None]
    print(f"{len(plans)} cells, {len(plans) - len(todo)} of them finished before", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_run_one, plan, out) for plan in todo]
        for done in as_completed(running):
            print(line(done.result()), flush=True)


def _finished(plan: Plan, out: Path) -> dict[str, Any] | None:
    """Return the result of a finished cell; None if it is not finished.

    Raises:
        SystemExit: the cell in the folder was run with another plan.
    """
    file = out / "cells" / plan.name / "cell.json"
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    differs = [key for key, value in asdict(plan).items() if result[key] != value]
    if differs:
        key = differs[0]
        sys.exit(
            f"error: {file}: was run with {key} {result[key]!r}, not {asdict(plan)[key]!r}: "
            "use another --out, or remove the file"
        )
    return result


def _run_one(plan: Plan, out: Path) -> dict[str, Any]:
    folder = (out / "cells" / plan.name).resolve()
    shutil.rmtree(folder, ignore_errors=True)  # files of an interrupted cell
    folder.mkdir(parents=True)
    plan.write(folder)
    # This checkout comes first on the path, because it is the one to measure.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log.txt", "wb") as log:
        command = [sys.executable, "-m", "benchmarks.grid.cell", str(folder)]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    for checkpoints in folder.glob("run/*/checkpoints"):
        shutil.rmtree(checkpoints)
    result = _finished(plan, out)
    return result if result is not None else asdict(plan) | {"exit": "crashed", "seconds": 0.0}


if __name__ == "__main__":
    main()
