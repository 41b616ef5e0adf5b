"""`bench`: measure in turn, take medians, print ratios; `step` against TRL, the other parts by themselves."""

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


def bench(
    context: typer.Context,
    part: Annotated[
        str, typer.Argument(metavar="[PART]", help="step (PPO, the default), rollout, reward, limit or growth.")
    ] = "step",
    peer_trl: Annotated[
        Path | None, typer.Option("--peer-trl", metavar="DIR", help="Where trl 1.12.0 is installed.")
    ] = None,
    layers: Annotated[str, typer.Option("--layers", help="all or top-half: the blocks with adapters.")] = "all",
    epochs: Annotated[int, typer.Option("--epochs", metavar="K", min=1, help="Passes over a rollout.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Measurements of each side.")] = 3,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Counted steps a measurement.")] = 2,
    model: Annotated[str, typer.Option("--model", help="100m, 1b or 8b: the random Llama's shape.")] = "100m",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Our side keeps activations at block boundaries only.")
    ] = False,
    figure: Annotated[Path | None, typer.Option("--figure", metavar="SVG", help="Draw growth there.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time a PPO step and its memory under LoRA and full tuning, and TRL's beside it; or a part of it."""
    one_of("--layers", layers, ["all", "top-half"])
    one_of("--model", model, list(work.MODELS))
    one_of("PART", part, list(READS))
    sources = {name: context.get_parameter_source(name) for name in context.params}
    refuse_unread(part, [name for name, source in sources.items() if source and source.name == "COMMANDLINE"])
    if part == "step":
        bench_step(model, layers, epochs, repeats, steps, checkpointing, peer_trl, json_file)
    else:
        bench_part(part, model, layers, repeats, figure, json_file)


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
    from perl.stages.material import quiet_libraries

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
    runners: dict[str, Callable[[], Measurement]] = {}
    for tuning in ("lora", "full"):
        content = work.recipe(model, tuning, layers, epochs, checkpointing)
        recipe = Recipe.model_validate(content).model_dump_json()
        ours = ["-m", "perl.bench.ours", recipe, steps + WARM_UP]
        runners[f"ours {tuning}"] = partial(_measure, "ours", ours)
        if peer_trl is not None:
            theirs = [script("trl_ppo"), model, tuning, epochs, steps + WARM_UP]
            runners[f"trl {tuning}"] = partial(_measure, "trl", theirs, peer_trl)
    runs: dict[str, list[Measurement]] = {name: [] for name in runners}
    for repeat in range(repeats):
        for name, run in runners.items():
            runs[name].append(run())
            seconds = [round(sum(step.values()), 2) for step in runs[name][-1].steps[WARM_UP:]]
            console.print(f"{repeat + 1}/{repeats} {name}: {seconds} s a step")
    sides = {name: _medians(some) for name, some in runs.items()}
    lora, full = (_Tuning(sides[f"ours {tuning}"], sides.get(f"trl {tuning}")) for tuning in ("lora", "full"))
    lora_to_full = _Ratio.of(lora.ours, full.ours)
    _print(lora, full, lora_to_full, f"{model} Llama, {epochs} epoch(s), our adapters on {layers} blocks")
    if json_file is not None:
        found = lora.as_json() | {"tuning_full": full.as_json(), "lora_to_full": asdict(lora_to_full)}
        write_metrics(json_file, found)


@dataclass(frozen=True)
class _Side:
    """Medians of one side under one tuning, over all steps that count."""

    seconds_per_step: float
    peak_over_start_bytes: float
    phases: dict[str, float]
    all_seconds: list[float]


@dataclass(frozen=True)
class _Ratio:
    """Of one side to another."""

    time: float
    memory: float

    @classmethod
    def of(cls, one: _Side, other: _Side) -> "_Ratio":
        return cls(
            one.seconds_per_step / other.seconds_per_step, one.peak_over_start_bytes / other.peak_over_start_bytes
        )


@dataclass(frozen=True)
class _Tuning:
    """The sides under one tuning."""

    ours: _Side
    trl: _Side | None

    def ratio(self) -> _Ratio | None:
        """Ours to TRL's."""
        return _Ratio.of(self.ours, self.trl) if self.trl is not None else None

    def as_json(self) -> dict[str, Any]:
        """What was measured, by name."""
        found = {"ours": self.ours, "trl": self.trl, "ratio": self.ratio()}
        return {name: asdict(one) for name, one in found.items() if one is not None}


def _measure(side: str, command: list[object], library: Path | None = None) -> Measurement:
    """What Python prints last under these arguments, in a process of its own.

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


def _print(lora: _Tuning, full: _Tuning, lora_to_full: _Ratio, what: str) -> None:
    table = Table("", "s a step", "peak over start", "phases", title=f"PPO on a random {what}")
    ratios: dict[str, _Ratio] = {}
    for name, tuning in (("LoRA", lora), ("full", full)):
        for side, one in (("ours", tuning.ours), ("trl", tuning.trl)):
            if one is not None:
                phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in one.phases.items())
                peak = bytes_text(one.peak_over_start_bytes)
                table.add_row(f"{side}, {name}", f"{one.seconds_per_step:.2f}", peak, phases)
        if ratio := tuning.ratio():
            ratios[f"ours / trl, {name}"] = ratio
    for name, ratio in (*ratios.items(), ("ours, LoRA / full", lora_to_full)):
        table.add_row(name, f"{ratio.time:.2f}", f"{ratio.memory:.2f}", "")
    console.print(table)
