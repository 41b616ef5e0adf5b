"""`bench`: alternate measurements, take medians, print ratios; only `step` is compared with TRL."""

import json
import os
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from perl.bench import work
from perl.bench.measurement import Measurement
from perl.commands.options import JsonFile, one_of
from perl.errors import UserError
from perl.recipe import Recipe
from perl.report.numbers import bytes_text
from perl.system.files import write_metrics
from perl.system.progress import console

WARM_UP = 1
"""Steps at the start of every measurement that are not counted, because they touch memory and fill caches
first."""
TUNINGS = {"lora": "LoRA", "full": "full"}
READS = {
    "step": ("algorithm", "model", "layers", "epochs", "repeats", "steps", "dtype", "checkpointing", "peer_trl"),
    "rollout": ("model", "repeats"),
    "reward": ("model", "repeats"),
    "limit": ("model", "layers"),
    "growth": ("figure",),
}
"""The options that each part reads, in addition to those that all of them read."""
SCRIPTS = Path(__file__).parents[2] / "benchmarks"
"""Where a checkout has the peers and the other parts, which the installed package does not have."""


def bench(
    context: typer.Context,
    part: Annotated[
        str, typer.Argument(metavar="[PART]", help="step (the default), rollout, reward, limit or growth.")
    ] = "step",
    algorithm: Annotated[
        str, typer.Option("--algorithm", help="ppo, rloo or grpo; the last two against the installed TRL.")
    ] = "ppo",
    peer_trl: Annotated[
        Path | None, typer.Option("--peer-trl", metavar="DIR", help="Where trl 1.12.0 is installed.")
    ] = None,
    layers: Annotated[str, typer.Option("--layers", help="all or top-half: the blocks with adapters.")] = "all",
    epochs: Annotated[int, typer.Option("--epochs", metavar="K", min=1, help="Passes over a rollout.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Measurements of each side.")] = 3,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Counted steps per measurement.")] = 2,
    model: Annotated[str, typer.Option("--model", help="100m, 1b or 8b: the size of the random Llama.")] = "100m",
    dtype: Annotated[
        str, typer.Option("--dtype", help="bfloat16, or float32 for a CPU that only emulates it.")
    ] = "bfloat16",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Checkpoint activations on our side.")
    ] = False,
    figure: Annotated[Path | None, typer.Option("--figure", metavar="SVG", help="Plot growth here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure time and memory of an RL step under LoRA and full tuning, compared with TRL; or a part of it."""
    one_of("--algorithm", algorithm, ["ppo", "rloo", "grpo"])
    one_of("--layers", layers, ["all", "top-half"])
    one_of("--model", model, list(work.MODELS))
    one_of("--dtype", dtype, ["bfloat16", "float32"])
    one_of("PART", part, list(READS))
    sources = {name: context.get_parameter_source(name) for name in context.params}
    refuse_unread(part, [name for name, source in sources.items() if source and source.name == "COMMANDLINE"])
    options = {
        "algorithm": algorithm,
        "model": model,
        "layers": layers,
        "epochs": epochs,
        "repeats": repeats,
        "steps": steps,
        "dtype": dtype,
    }
    options |= {"checkpointing": checkpointing, "peer_trl": peer_trl, "figure": figure}
    measure: Callable[..., dict[str, Any]] = bench_step if part == "step" else measure_of(part)
    metrics = measure(**{name: options[name] for name in READS[part]})
    if part != "step":
        console.print(f"[bold]{part}[/]{f', {model}' if 'model' in READS[part] else ''}")
        console.print_json(json.dumps(metrics))
    if json_file is not None:
        write_metrics(json_file, metrics)


def script(name: str) -> Path:
    """Return a file of `SCRIPTS`.

    Raises:
        UserError: this package is installed without a checkout.
    """
    file = SCRIPTS / f"{name}.py"
    if not file.exists():
        raise UserError(
            "this measurement needs a checkout, and perl-rlhf is installed without one",
            where=f"benchmarks/{name}.py",
            remedy="Clone the project, and run there: pip install --editable .",
        )
    return file


def measure_of(part: str) -> Callable[..., dict[str, Any]]:
    """Return the function that measures a part other than `step`. Raises `UserError` as `script`."""
    measure: Callable[..., dict[str, Any]] = runpy.run_path(str(script(f"parts/{part}")))["measure"]
    from perl.stages.material import quiet_libraries

    quiet_libraries()
    return measure


def refuse_unread(part: str, given: Iterable[str]) -> None:
    """Refuse an option that only other parts read.

    Args:
        part: one of `READS`.
        given: names of the command's parameters that were given.

    Raises:
        UserError: this part does not use one of them.
    """
    for option in given:
        readers = [name for name, options in READS.items() if option in options]
        if readers and part not in readers:
            raise UserError(
                f"bench {part} does not use this option",
                where=f"--{option.replace('_', '-')}",
                remedy=f"Leave it out; it is for bench {', '.join(readers)}.",
            )


def bench_step(
    algorithm: str,
    model: str,
    layers: str,
    epochs: int,
    repeats: int,
    steps: int,
    dtype: str,
    checkpointing: bool,
    peer_trl: Path | None,
) -> dict[str, Any]:
    """Measure a step under both tunings, ours and TRL's; print medians and ratios.

    Args:
        repeats: measurements of each side, taken in turn.
        steps: counted steps per measurement.
        peer_trl: folder of the TRL that has PPO; the other algorithms use the installed TRL.

    Raises:
        UserError: the peer's folder or script is missing, or a measurement fails.
    """
    if peer_trl is not None and algorithm != "ppo":
        raise UserError(
            f"for {algorithm} the installed TRL is the peer", where="--peer-trl", remedy="Leave it out."
        )
    if peer_trl is not None and not (peer_trl / "trl" / "experimental" / "ppo").is_dir():
        raise UserError(
            "contains no TRL with a PPO trainer",
            where=f"--peer-trl {peer_trl}",
            remedy="pip install --no-deps --target DIR trl==1.12.0",
        )
    runners: dict[str, Callable[[], Measurement]] = {}
    for tuning, label in TUNINGS.items():
        content = work.recipe(model, tuning, layers, epochs, checkpointing, algorithm, dtype)
        ours = ["-m", "perl.bench.ours", Recipe.model_validate(content).model_dump_json(), steps + WARM_UP]
        runners[f"ours, {label}"] = partial(_measure, "ours", ours)
        if algorithm != "ppo" or peer_trl is not None:
            peer: list[object] = [script("trl_ppo")] if algorithm == "ppo" else [script("trl_groups"), algorithm]
            peer += [model, tuning, epochs, steps + WARM_UP, dtype]
            runners[f"trl, {label}"] = partial(_measure, "trl", peer, peer_trl)
    runs: dict[str, list[Measurement]] = {name: [] for name in runners}
    for repeat in range(repeats):
        for name, run in runners.items():
            runs[name].append(run())
            seconds = [round(sum(step.values()), 2) for step in runs[name][-1].steps[WARM_UP:]]
            console.print(f"{repeat + 1}/{repeats} {name}: {seconds} s per step")
    sides = {name: _medians(measurements) for name, measurements in runs.items()}
    lora, full = (_tuning(sides[f"ours, {one}"], sides.get(f"trl, {one}")) for one in TUNINGS.values())
    lora_to_full = sides["ours, LoRA"].ratio(sides["ours, full"])
    ratios = {"ours / trl, LoRA": lora.get("ratio"), "ours / trl, full": full.get("ratio")}
    title = f"{model} Llama in {dtype}, {epochs} epoch(s), our adapters on {layers} blocks"
    _print(algorithm, sides, ratios | {"ours, LoRA / full": lora_to_full}, title)
    return lora | {"tuning_full": full, "lora_to_full": lora_to_full}


@dataclass(frozen=True)
class _Side:
    """Medians of one side under one tuning, over all counted steps."""

    seconds_per_step: float
    peak_over_start_bytes: float
    phases: dict[str, float]
    all_seconds: list[float]

    def ratio(self, other: "_Side") -> dict[str, float]:
        """Return the ratios of this side to the other."""
        return {
            "time": self.seconds_per_step / other.seconds_per_step,
            "memory": self.peak_over_start_bytes / other.peak_over_start_bytes,
        }


def _tuning(ours: _Side, trl: _Side | None) -> dict[str, Any]:
    """Return the sides under one tuning, as JSON."""
    if trl is None:
        return {"ours": asdict(ours)}
    return {"ours": asdict(ours), "trl": asdict(trl), "ratio": ours.ratio(trl)}


def _measure(side: str, command: list[object], library: Path | None = None) -> Measurement:
    """Run Python with these arguments in a separate process and parse the last line that it prints.

    Args:
        side: name for the error message.
        library: a folder whose packages take precedence over those installed.
    """
    paths = [*([library] if library else []), SCRIPTS.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
        last = lines[-1] if lines else "no message"
        raise UserError(f"the measurement failed: {last}", where=f"bench {side}", remedy="See this message.")
    return Measurement(**json.loads(done.stdout.strip().splitlines()[-1]))


def _medians(runs: list[Measurement]) -> _Side:
    steps = [step for run in runs for step in run.steps[WARM_UP:]]
    seconds = [sum(step.values()) for step in steps]
    phases = {name for step in steps for name in step}
    return _Side(
        seconds_per_step=statistics.median(seconds),
        peak_over_start_bytes=statistics.median(run.peak_over_start_bytes for run in runs),
        phases={name: statistics.median(step.get(name, 0.0) for step in steps) for name in phases},
        all_seconds=seconds,
    )


def _print(algorithm: str, sides: dict[str, _Side], ratios: dict[str, dict[str, float] | None], what: str) -> None:
    table = Table("", "s per step", "peak over start", "phases", title=f"{algorithm} on a random {what}")
    for name, side in sides.items():
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in side.phases.items())
        table.add_row(name, f"{side.seconds_per_step:.2f}", bytes_text(side.peak_over_start_bytes), phases)
    for name, ratio in ratios.items():
        if ratio is not None:
            table.add_row(name, f"{ratio['time']:.2f}", f"{ratio['memory']:.2f}", "")
    console.print(table)
