"""The command: measure in turn, take medians, print ratios; `step` against TRL, the other parts by themselves."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from perl.bench import growth, limit, reward, rollout, work
from perl.errors import UserError
from perl.recipe import Recipe
from perl.report.numbers import bytes_text
from perl.stages.material import quiet_libraries
from perl.system.files import write_metrics
from perl.system.progress import console

WARM_UP = 1
"""Steps at the start of every measurement that do not count: memory is first touched, caches are first filled."""


@dataclass
class _Side:
    """One contestant's measurements."""

    runs: list[dict[str, Any]] = field(default_factory=list)

    def steps(self) -> list[dict[str, float]]:
        return [step for run in self.runs for step in run["steps"][WARM_UP:]]

    def seconds_per_step(self) -> float:
        return statistics.median(sum(step.values()) for step in self.steps())

    def as_json(self) -> dict[str, Any]:
        phases = {name for step in self.steps() for name in step}
        return {
            "seconds_per_step": self.seconds_per_step(),
            "peak_over_start_bytes": statistics.median(run["peak_over_start_bytes"] for run in self.runs),
            "phases": {name: statistics.median(step.get(name, 0.0) for step in self.steps()) for name in phases},
            "all_seconds": [sum(step.values()) for step in self.steps()],
        }


def bench_part(
    part: str, model: str, layers: str, repeats: int, figure: Path | None, json_file: Path | None
) -> None:
    """Measure one of `PARTS`; print and write its metrics, and draw them where there is something to draw."""
    options = {"model": model, "layers": layers, "repeats": repeats, "figure": figure}
    read = {name: options[name] for name in READS[part]}
    quiet_libraries()
    found = PARTS[part](**read)
    console.print(f"[bold]{part}[/]{f', {model}' if 'model' in read else ''}")
    console.print_json(json.dumps(found))
    if json_file is not None:
        write_metrics(json_file, found)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "rollout": rollout.measure,
    "reward": reward.measure,
    "limit": limit.measure,
    "growth": growth.measure,
}
"""Beside `step`: what the steps of the method are made of."""
READS = {
    "step": ("model", "layers", "epochs", "repeats", "steps", "checkpointing", "peer_trl"),
    "rollout": ("model", "repeats"),
    "reward": ("model", "repeats"),
    "limit": ("model", "layers"),
    "growth": ("figure",),
}
"""The options that each part reads, beside those that all of them do."""


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
        repeats: how often every contestant is measured, in turn.
        steps: that count, of each measurement.
        checkpointing: whether our side keeps activations at block boundaries only.
        peer_trl: a folder with trl 1.12.0; None: ours alone.
        json_file: where the metrics go.

    Raises:
        UserError: the peer's folder is none, or a measurement fails.
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
        runners[f"ours {tuning}"] = partial(_measure, "ours", [recipe, str(steps + WARM_UP)], None)
        if peer_trl is not None:
            arguments = [model, tuning, str(epochs), str(steps + WARM_UP)]
            runners[f"trl {tuning}"] = partial(_measure, "trl_ppo", arguments, peer_trl)
    sides = {name: _Side() for name in runners}
    for repeat in range(repeats):
        for name, run in runners.items():
            sides[name].runs.append(run())
            seconds = [round(sum(step.values()), 2) for step in sides[name].runs[-1]["steps"][WARM_UP:]]
            console.print(f"{repeat + 1}/{repeats} {name}: {seconds} s a step")
    found = _figures(sides)
    _print(found, f"PPO on a random {model} Llama, {epochs} epoch(s), our adapters on {layers} blocks")
    if json_file is not None:
        write_metrics(json_file, found)


def _measure(module: str, arguments: list[str], path: Path | None) -> dict[str, Any]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path is not None else {})
    command = [sys.executable, "-m", f"perl.bench.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
        last = lines[-1] if lines else "no message"
        raise UserError(f"the measurement failed: {last}", where=f"bench {module}", remedy="See the message.")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _figures(sides: dict[str, _Side]) -> dict[str, Any]:
    """`ours`, `trl` and `ratio` under LoRA; the same under full tuning in `tuning_full`."""

    def of(tuning: str) -> dict[str, Any]:
        found = {
            side: sides[f"{side} {tuning}"].as_json() for side in ("ours", "trl") if f"{side} {tuning}" in sides
        }
        return found | ({"ratio": _ratio(found["ours"], found["trl"])} if "trl" in found else {})

    lora, full = of("lora"), of("full")
    return lora | {"tuning_full": full, "lora_to_full": _ratio(lora["ours"], full["ours"])}


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {
        "time": one["seconds_per_step"] / other["seconds_per_step"],
        "memory": one["peak_over_start_bytes"] / other["peak_over_start_bytes"],
    }


def _print(found: dict[str, Any], title: str) -> None:
    table = Table("", "s a step", "peak over start", "phases", title=title)
    for tuning, metrics in (("LoRA", found), ("full", found["tuning_full"])):
        for side in ("ours", "trl"):
            if side in metrics:
                one = metrics[side]
                phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in one["phases"].items())
                peak = bytes_text(one["peak_over_start_bytes"])
                table.add_row(f"{side}, {tuning}", f"{one['seconds_per_step']:.2f}", peak, phases)
        if "ratio" in metrics:
            ratio = metrics["ratio"]
            table.add_row(f"ours / trl, {tuning}", f"{ratio['time']:.2f}", f"{ratio['memory']:.2f}", "")
    both = found["lora_to_full"]
    table.add_row("ours, LoRA / full", f"{both['time']:.2f}", f"{both['memory']:.2f}", "")
    console.print(table)
