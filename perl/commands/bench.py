"""The command: measure in turn, take medians, print ratios; `step` against TRL, the other parts by themselves."""

import json
import os
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from perl.bench import work
from perl.errors import UserError
from perl.recipe import Recipe
from perl.report.numbers import bytes_text
from perl.stages.material import quiet_libraries
from perl.system.files import write_metrics
from perl.system.progress import console

WARM_UP = 1
"""Steps at the start of every measurement that do not count: memory is first touched, caches are first filled."""
READS = {
    "step": ("model", "layers", "epochs", "repeats", "steps", "checkpointing", "peer_trl"),
    "rollout": ("model", "repeats"),
    "reward": ("model", "repeats"),
    "limit": ("model", "layers"),
    "growth": ("figure",),
}
"""The options that each part reads, beside those that all of them do."""
SCRIPTS = Path(__file__).parents[2] / "benchmarks"
"""Where a checkout has the peers and the other parts; the installed package has none of them."""


def script(name: str) -> Path:
    """A file of `SCRIPTS`.

    Raises:
        UserError: this package is installed without a checkout.
    """
    file = SCRIPTS / f"{name}.py"
    if not file.exists():
        raise UserError(
            "this measurement is in a checkout only, and perl-rlhf is installed without one",
            where=f"benchmarks/{name}.py",
            remedy="Clone the project, and there: pip install --editable .",
        )
    return file


def measure_of(part: str) -> Callable[..., dict[str, Any]]:
    """The function that measures a part other than `step`.

    Raises:
        UserError: as `script`.
    """
    return runpy.run_path(str(script(f"parts/{part}")))["measure"]  # type: ignore[no-any-return]


def bench_part(
    part: str, model: str, layers: str, repeats: int, figure: Path | None, json_file: Path | None
) -> None:
    """Measure a part other than `step`; print and write its metrics, and draw them where there is a figure.

    Raises:
        UserError: as `script`, or the metrics cannot be written.
    """
    options = {"model": model, "layers": layers, "repeats": repeats, "figure": figure}
    measure = measure_of(part)
    quiet_libraries()
    found = measure(**{name: options[name] for name in READS[part]})
    console.print(f"[bold]{part}[/]{f', {model}' if 'model' in READS[part] else ''}")
    console.print_json(json.dumps(found))
    if json_file is not None:
        write_metrics(json_file, found)


def refuse_unread(part: str, given: Iterable[str]) -> None:
    """Refuse what a part would ignore.

    Args:
        part: one of `READS`.
        given: names of the command's parameters that were given.

    Raises:
        UserError: other parts read one of them, this one does not.
    """
    for option in given:
        readers = [name for name, options in READS.items() if option in options]
        if readers and part not in readers:
            raise UserError(
                f"bench {part} does not read it",
                where=f"--{option.replace('_', '-')}",
                remedy=f"Leave it out; it is for bench {', '.join(readers)}.",
            )


def bench_step(
    model: str,
    layers: str,
    epochs: int,
    repeats: int,
    steps: int,
    checkpointing: bool,
    peer_trl: Path | None,
    json_file: Path | None,
) -> None:
    """Measure a PPO step under both tunings, and TRL's beside it; print and write medians and ratios.

    Args:
        model: one of `work.MODELS`.
        layers: `all` or `top-half`: which blocks our adapters are on.
        epochs: passes over each rollout.
        repeats: how often every side is measured, in turn.
        steps: that count, of each measurement.
        checkpointing: whether our side keeps activations at block boundaries only.
        peer_trl: a folder with trl 1.12.0; None: ours alone.
        json_file: where the metrics go.

    Raises:
        UserError: the peer's folder or script is missing, or a measurement fails.
    """
    if peer_trl is not None and not (peer_trl / "trl" / "experimental" / "ppo").is_dir():
        raise UserError(
            "no TRL with a PPO trainer there",
            where=f"--peer-trl {peer_trl}",
            remedy="pip install --no-deps --target DIR trl==1.12.0",
        )
    runners: dict[str, Callable[[], dict[str, Any]]] = {}
    for tuning in ("lora", "full"):
        content = work.recipe(model, tuning, layers, epochs, checkpointing)
        recipe = Recipe.model_validate(content).model_dump_json()
        ours = ["-m", "perl.bench.ours", recipe, steps + WARM_UP]
        runners[f"ours {tuning}"] = partial(_measure, "ours", ours)
        if peer_trl is not None:
            theirs = [script("trl_ppo"), model, tuning, epochs, steps + WARM_UP]
            runners[f"trl {tuning}"] = partial(_measure, "trl", theirs, peer_trl)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
    for repeat in range(repeats):
        for name, run in runners.items():
            runs[name].append(run())
            seconds = [round(sum(step.values()), 2) for step in runs[name][-1]["steps"][WARM_UP:]]
            console.print(f"{repeat + 1}/{repeats} {name}: {seconds} s a step")
    found = _compared({name: _medians(some) for name, some in runs.items()})
    _print(found, f"PPO on a random {model} Llama, {epochs} epoch(s), our adapters on {layers} blocks")
    if json_file is not None:
        write_metrics(json_file, found)


def _measure(side: str, command: list[object], library: Path | None = None) -> dict[str, Any]:
    """The JSON that Python prints last under these arguments, in a process of its own.

    Args:
        side: who is measured.
        command: the arguments.
        library: a folder whose packages are imported rather than those installed.
    """
    paths = [*([library] if library else []), SCRIPTS.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *command]
    done = subprocess.run(
        [str(one) for one in command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
        last = lines[-1] if lines else "no message"
        raise UserError(f"the measurement failed: {last}", where=f"bench {side}", remedy="See the message.")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    steps: list[dict[str, float]] = [step for run in runs for step in run["steps"][WARM_UP:]]
    seconds = [sum(step.values()) for step in steps]
    phases = {name for step in steps for name in step}
    return {
        "seconds_per_step": statistics.median(seconds),
        "peak_over_start_bytes": statistics.median(run["peak_over_start_bytes"] for run in runs),
        "phases": {name: statistics.median(step.get(name, 0.0) for step in steps) for name in phases},
        "all_seconds": seconds,
    }


def _compared(sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`ours`, `trl` and `ratio` under LoRA; the same under full tuning in `tuning_full`."""
    lora, full = (
        {side: sides[name] for side in ("ours", "trl") if (name := f"{side} {tuning}") in sides}
        for tuning in ("lora", "full")
    )
    for found in (lora, full):
        if "trl" in found:
            found["ratio"] = _ratio(found["ours"], found["trl"])
    return lora | {"tuning_full": full, "lora_to_full": _ratio(lora["ours"], full["ours"])}


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {
        "time": one["seconds_per_step"] / other["seconds_per_step"],
        "memory": one["peak_over_start_bytes"] / other["peak_over_start_bytes"],
    }


def _print(found: dict[str, Any], title: str) -> None:
    table = Table("", "s a step", "peak over start", "phases", title=title)

    def add_ratio(name: str, ratio: dict[str, float]) -> None:
        table.add_row(name, f"{ratio['time']:.2f}", f"{ratio['memory']:.2f}", "")

    for tuning, metrics in (("LoRA", found), ("full", found["tuning_full"])):
        for side in ("ours", "trl"):
            if side in metrics:
                one = metrics[side]
                phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in one["phases"].items())
                peak = bytes_text(one["peak_over_start_bytes"])
                table.add_row(f"{side}, {tuning}", f"{one['seconds_per_step']:.2f}", peak, phases)
        if "ratio" in metrics:
            add_ratio(f"ours / trl, {tuning}", metrics["ratio"])
    add_ratio("ours, LoRA / full", found["lora_to_full"])
    console.print(table)
