"""`estimate`: whether a recipe fits and, if not, what would make it fit; its time and its cost."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from perl.commands.compare import TUNINGS
from perl.commands.estimate_workers import Workers
from perl.commands.options import JsonFile, Overrides, RecipeFile, say_loading
from perl.errors import UserError
from perl.recipe import Recipe, StageName, load_recipe
from perl.report.numbers import bytes_text, joined, seconds_text
from perl.sweep.setting import variant
from perl.system.files import write_metrics
from perl.system.progress import console, counted
from perl.system.typed_json import as_json

if TYPE_CHECKING:
    from perl.measure.probe import Kind
    from perl.predict import Memory, Subject, Traced
    from perl.predict.device import Device
    from perl.predict.seconds import StageTime

SHORT: "dict[Kind, str]" = {
    "base_weights": "base",
    "adapters": "adapters",
    "gradients": "grads",
    "optimizer": "optim",
    "kv_cache": "KV",
    "activations": "activ",
}
Prediction = dict[StageName, "Memory"]


def parse_bytes(text: str) -> int:
    """Parse bytes from text such as 24GB, 80GiB or 1.5e9; GB is 10⁹, GiB 2³⁰.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(I?)B?", text.strip(), re.IGNORECASE)
    try:
        unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
        size = float(match[1]) * unit if match else 0.0
    except ValueError:
        size = 0.0
    if 1 <= size < 1_000_000:  # no device has so little: the unit is missing
        raise UserError(f"{text!r} is {size:,.0f} bytes", where="--device-memory", remedy=f"Write {size:.0f}GB.")
    if not 1 <= size < 2**60:
        raise UserError(f"{text!r} is not a size", where="--device-memory", remedy="For example 24GB or 80GiB.")
    return int(size)


def estimate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device_memory: Annotated[
        str | None, typer.Option("--device-memory", metavar="SIZE", help="Memory of one device, such as 24GB.")
    ] = None,
    devices: Annotated[
        int, typer.Option("--devices", metavar="N", min=1, help="Shard over N devices (ZeRO-3 or FSDP).")
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="Predict the time on h200, h100, a100, l40s, 4090 or cpu."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine first (a minute) and predict its time.")
    ] = False,
    price: Annotated[
        float | None, typer.Option("--price", metavar="PER_HOUR", min=0.0, help="Price of a device, for the cost.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Predict peak memory and time by stage and phase, without loading weights; say what to change to fit."""
    loaded = load_recipe(recipe, overrides)
    limit = parse_bytes(device_memory) if device_memory else None
    if calibrate and device is not None:
        raise UserError("--calibrate measures this machine", where="--device", remedy="Leave one of them out.")
    with Workers(devices) as workers:
        say_loading()
        from perl.backbones import backbone_of
        from perl.predict import read_subject

        speed = _speed(device, calibrate)
        workers.subject = subject = read_subject(loaded)
        metrics: dict[str, object] = {"name": loaded.name, "devices": devices, "basis": speed.basis}
        seconds: dict[str, dict[StageName, StageTime]] = {}
        tunings = _tunings(loaded)
        for label, found in workers.in_turn(tunings):
            prediction = {stage: traced.memory for stage, traced in found.items()}
            metrics[label], seconds[label] = as_json(prediction), _times(tunings[label], subject, found, speed)
            console.print(_table(label, prediction, devices, limit))
            _say_seconds(tunings[label], seconds[label], speed, devices, price)
            if limit is not None and label == loaded.tuning:
                metrics["fits"] = _say_whether_it_fits(loaded, prediction, limit)
        metrics |= _in_json(seconds, price, devices)
        if limit is not None and not metrics["fits"]:
            four_bit = backbone_of(subject.config).refusal("4bit", "base.quantization") is None
            changes = _alternatives(loaded, recipe, overrides or [], four_bit)
            metrics["changes"] = _say_changes(workers, changes, limit)
    if json_file is not None:
        write_metrics(json_file, metrics)


def print_prediction(recipe: Recipe) -> None:
    """Print the predicted peak memory of a recipe in a table."""
    from perl.predict import predict, read_subject

    console.print(_table(recipe.name, predict(recipe, read_subject(recipe)), 1, None))


def _tunings(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe under both tunings, its own first; only its own if the other does not support it."""
    found: dict[str, Recipe] = {}
    for tuning in sorted(TUNINGS, key=lambda one: one != recipe.tuning):
        try:
            found[tuning] = variant(recipe, tuning, recipe.seed)
        except UserError as error:
            console.print(f"{tuning} is left out: {error.what}", style="yellow", markup=False)
    return found


def _speed(name: str | None, calibrate: bool) -> "Device":
    from perl.predict.calibrate import calibrated, measure
    from perl.predict.device import named

    if calibrate:
        console.print("Measuring this machine (about a minute) …")
        return measure()
    return named(name) if name is not None else calibrated() or named("cpu")


def _alternatives(recipe: Recipe, file: Path, overrides: list[str], four_bit: bool) -> dict[str, Recipe]:
    """Return the recipe with settings that need less memory, each alone, then all together.

    Args:
        four_bit: whether its base can have 4-bit weights.
    """
    full, rl = recipe.tuning == "full", recipe.rl is not None
    settings = [] if recipe.checkpoint_activations else [["checkpoint_activations=true"]]
    smaller = [f"{stage}.batch_size=1" for stage in ("sft", "reward") if stage in recipe.stages]
    settings.append([*smaller, *["rl.micro_batch_size=1"] * rl])
    if full:
        settings.append(["tuning=lora"])
    elif getattr(recipe.adapter_settings, "layers", None) == "all":
        section = "adapter" if recipe.lora is None else "lora"
        settings.append([f"{section}.layers=top-half"])
    if rl and recipe.critic == "adapter" and not full:
        settings.append(["rl.critic=shared"])
    refused = recipe.adapter is not None and recipe.adapter.four_bit_refusal
    if four_bit and recipe.base.quantization == "none" and recipe.base.build is None and not refused:
        settings.append(["base.quantization=4bit", *["tuning=lora"] * full])
    settings.append(list(dict.fromkeys(setting for group in settings for setting in group)))
    # For a recipe with full tuning, use the default critic of LoRA.
    critic = ["rl.critic=null"] if full and rl else []
    return {
        " ".join(group): load_recipe(file, [*overrides, *(critic if "tuning=lora" in group else []), *group])
        for group in settings
    }


def _say_changes(workers: Workers, changes: Mapping[str, Recipe], device_memory: int) -> dict[str, object]:
    """Print a line for each change as soon as its result is known."""
    console.print("Changes that need less memory:")
    found: dict[str, object] = {}
    for label, traced in workers.in_turn(changes):
        peak = _peak({stage: one.memory for stage, one in traced.items()})
        fits = peak <= device_memory
        console.print(
            f"  {bytes_text(peak):>8}  {'fits        ' if fits else 'does not fit'}  {label}", markup=False
        )
        found[label] = {"peak": peak, "fits": fits}
    return found


def _times(
    recipe: Recipe, subject: "Subject", found: "Mapping[StageName, Traced]", speed: "Device"
) -> "dict[StageName, StageTime]":
    from perl.predict.seconds import stage_time

    return {
        stage: stage_time(recipe, stage, traced.work, subject.sizes[stage], speed)
        for stage, traced in found.items()
    }


def _hours(times: "Mapping[StageName, StageTime]") -> float:
    return sum(time.total for time in times.values()) / 3600


def _in_json(
    seconds: "Mapping[str, Mapping[StageName, StageTime]]", price: float | None, devices: int
) -> dict[str, object]:
    """Return, by tuning, seconds per step by phase and per stage, the recipe's hours and their price."""
    hours = {label: _hours(times) for label, times in seconds.items()}
    found: dict[str, object] = {
        "seconds": {
            label: {
                stage: {**time.step, "training": time.training, "evaluation": time.evaluation}
                for stage, time in times.items()
            }
            for label, times in seconds.items()
        },
        "hours": hours,
    }
    if price is not None:
        found["cost"] = {label: one * price * devices for label, one in hours.items()}
    return found


def _say_seconds(
    recipe: Recipe, times: "Mapping[StageName, StageTime]", speed: "Device", devices: int, price: float | None
) -> None:
    for stage, time in times.items():
        phases = ", ".join(f"{phase} {seconds_text(spent)}" for phase, spent in time.step.items())
        line = f"{stage}: {phases} per step of the longest rows; {counted(time.steps, 'step')} "
        line += f"{seconds_text(time.training)}, evaluation {seconds_text(time.evaluation)}"
        if time.draws_at_most > 1:
            line += f"; generate and score up to {time.draws_at_most} times if groups are redrawn"
        console.print(f"{line}.", markup=False)
    hours = _hours(times)
    money = "" if price is None else f", {hours * price * devices:,.2f} at {price:g} per device-hour"
    left_out = ["communication between devices"] * (devices > 1)
    left_out += ["training the tiny base"] * (recipe.base.build is not None)
    without = f", without {joined(left_out)}" if left_out else ""
    console.print(
        f"All of {recipe.name} ({recipe.tuning}) on {speed.name}: about {seconds_text(hours * 3600)}{without}"
        f"{money}. This is a prediction; its basis: {speed.basis}.",
        markup=False,
    )


def _peak(prediction: Prediction) -> int:
    return max(phase.peak for memory in prediction.values() for phase in memory.values())


def _say_whether_it_fits(recipe: Recipe, own: Prediction, device_memory: int) -> bool:
    peak, room = _peak(own), bytes_text(device_memory)
    stage = max(own, key=lambda name: max(phase.peak for phase in own[name].values()))
    verdict = "[green]It fits[/]" if peak <= device_memory else "[red]It does not fit[/]"
    console.print(
        f"{verdict}: {recipe.name} ({recipe.tuning}) needs {bytes_text(peak)} of {room}, the peak is in {stage}. "
        "These are the bytes of live tensors; the CUDA context and fragmentation take about 1 GB more."
    )
    return peak <= device_memory


def _table(label: str, prediction: Prediction, devices: int, device_memory: int | None) -> Table:
    where = f", each of {devices} devices (ZeRO-3 or FSDP)" if devices > 1 else ""
    table = Table(title=f"{label}{where}", padding=0, show_edge=False)  # fits in 80 columns
    for column in ("stage", "phase", "peak", *SHORT.values()):
        table.add_column(column, no_wrap=True, justify="left" if column in ("stage", "phase") else "right")
    for stage, memory in prediction.items():
        for phase, peak in memory.items():
            too_much = device_memory is not None and peak.peak > device_memory
            cells = [bytes_text(peak.kinds[kind]) if kind in peak.kinds else "" for kind in SHORT]
            table.add_row(stage, phase, bytes_text(peak.peak), *cells, style="red" if too_much else None)
    return table
