"""`estimate`: will it fit, and if not, what would make it fit."""

import os
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from perl.commands.compare import TUNINGS
from perl.commands.options import JsonFile, Overrides, RecipeFile, say_loading
from perl.errors import UserError
from perl.recipe import Recipe, StageName, load_recipe
from perl.report.numbers import bytes_text
from perl.sweep.setting import variant
from perl.system.files import write_metrics
from perl.system.progress import console, track
from perl.system.typed_json import as_json

if TYPE_CHECKING:
    from perl.measure.probe import Kind
    from perl.predict import Memory, Subject

SHORT: "dict[Kind, str]" = {
    "base_weights": "base",
    "adapters": "adapters",
    "gradients": "grads",
    "optimizer": "optim",
    "kv_cache": "KV",
    "activations": "activ",
}
SHARDED = ("base_weights", "adapters", "gradients", "optimizer")
"""What ZeRO-3 and FSDP spread over the devices."""

Prediction = dict[StageName, "Memory"]


def parse_bytes(text: str) -> int:
    """Bytes from text such as 24GB, 80GiB or 1.5e9; GB is 10⁹, GiB 2³⁰.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(I?)B?", text.strip(), re.IGNORECASE)
    try:
        unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
        size = float(match[1]) * unit if match else 0.0
    except ValueError:
        size = 0.0
    if 1 <= size < 1_000_000:  # no device has so little: the unit was forgotten
        raise UserError(f"{text!r} is {size:,.0f} bytes", where="--device-memory", remedy=f"Write {size:.0f}GB.")
    if not 1 <= size < 2**60:
        raise UserError(f"{text!r} is no size", where="--device-memory", remedy="For example 24GB or 80GiB.")
    return int(size)


def estimate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device_memory: Annotated[
        str | None, typer.Option("--device-memory", metavar="SIZE", help="What one device has, such as 24GB.")
    ] = None,
    devices: Annotated[
        int, typer.Option("--devices", metavar="N", min=1, help="Shard over so many (ZeRO-3 or FSDP).")
    ] = 1,
    json_file: JsonFile = None,
) -> None:
    """Predict peak memory by stage and phase, without loading weights; say what to change if it does not fit."""
    loaded = load_recipe(recipe, overrides)
    limit = parse_bytes(device_memory) if device_memory else None
    say_loading()
    from perl.backbones import backbone_of
    from perl.predict import read_subject

    subject = read_subject(loaded)
    predictions = _predict_all(_tunings(loaded), subject, devices)
    for label, prediction in predictions.items():
        console.print(_table(label, prediction, devices, limit))
    metrics: dict[str, Any] = {label: as_json(prediction) for label, prediction in predictions.items()}
    if limit is not None:
        own = predictions[loaded.tuning]
        metrics["fits"] = _peak(own) <= limit
        _say_whether_it_fits(loaded, own, limit)
        if not metrics["fits"]:
            four_bit = backbone_of(subject.config).refusal("4bit", "base.quantization") is None
            changes = _predict_all(_alternatives(loaded, recipe, overrides or [], four_bit), subject, devices)
            peaks = {label: _peak(prediction) for label, prediction in changes.items()}
            _say_changes(peaks, limit)
            metrics["changes"] = {label: {"peak": peak, "fits": peak <= limit} for label, peak in peaks.items()}
    if json_file is not None:
        write_metrics(json_file, {"name": loaded.name, "devices": devices, **metrics})


def print_prediction(recipe: Recipe) -> None:
    """The peak memory of a recipe as it is, in a table."""
    from perl.predict import predict, read_subject

    console.print(_table(recipe.name, predict(recipe, read_subject(recipe)), 1, None))


def _tunings(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe under both tunings, or under its own where it has what the other does not."""
    found: dict[str, Recipe] = {}
    for tuning in TUNINGS:
        try:
            found[tuning] = variant(recipe, tuning, recipe.seed)
        except UserError as error:
            console.print(f"{tuning} is left out: {error.what}", style="yellow", markup=False)
    return found


def _predict_all(recipes: Mapping[str, Recipe], subject: "Subject", devices: int) -> dict[str, Prediction]:
    """In parallel processes: each prediction is up to a minute of Python, not of arithmetic."""
    workers = min(len(recipes), os.cpu_count() or 1)
    context = get_context("forkserver")
    context.set_forkserver_preload(["perl.predict"])  # what takes long to import, once for all
    with ProcessPoolExecutor(workers, context) as pool, track("predicting", len(recipes)) as bar:
        futures = {label: pool.submit(_predict, recipe, subject, devices) for label, recipe in recipes.items()}
        for _ in as_completed(futures.values()):
            bar()
        return {label: future.result() for label, future in futures.items()}


def _predict(recipe: Recipe, subject: "Subject", devices: int) -> Prediction:
    import torch

    from perl.predict import predict, weight_sizes
    from perl.stages.material import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    try:
        prediction = predict(_share(recipe, devices) if devices > 1 else recipe, subject)
    except UserError:
        raise
    except Exception as error:  # some of torch's cannot be sent from one process to another
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    if devices == 1:
        return prediction
    size = weight_sizes(subject.config, getattr(torch, recipe.base.dtype))
    # Gathered are the block that computes, the next one, and all that is outside the blocks.
    gathered = 2 * size.block + size.outside
    return {stage: _sharded(memory, devices, gathered) for stage, memory in prediction.items()}


def _share(recipe: Recipe, devices: int) -> Recipe:
    """One device's part of every batch."""
    content = recipe.model_dump()
    for stage, key in (("sft", "batch_size"), ("reward", "batch_size"), ("rl", "prompts_per_step")):
        if content[stage]:
            content[stage][key] = -(-content[stage][key] // devices)
    if rl := content["rl"]:
        rl["micro_batch_size"] = min(rl["micro_batch_size"], rl["prompts_per_step"] * rl["samples_per_prompt"])
    return Recipe.model_validate(content)


def _sharded(memory: "Memory", devices: int, gathered: int) -> "Memory":
    from perl.predict import changed

    spread: Memory = {}
    for phase, peak in memory.items():
        less = {kind: -count * (1 - 1 / devices) for kind, count in peak.kinds.items() if kind in SHARDED}
        spread |= changed({phase: peak}, less | {"activations": gathered})
    return spread


def _alternatives(recipe: Recipe, file: Path, overrides: list[str], four_bit: bool) -> dict[str, Recipe]:
    """The recipe with settings that need less memory, each alone, then together.

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
    # Of a recipe for full tuning the critic is the other tuning's default.
    critic = ["rl.critic=null"] if full and rl else []
    return {
        " ".join(group): load_recipe(file, [*overrides, *(critic if "tuning=lora" in group else []), *group])
        for group in settings
    }


def _say_changes(peaks: Mapping[str, int], device_memory: int) -> None:
    table = Table("change", "peak", "fits", title="What would need less")
    for label, peak in peaks.items():
        table.add_row(label, bytes_text(peak), "yes" if peak <= device_memory else "no")
    console.print(table)


def _peak(prediction: Prediction) -> int:
    return max(phase.peak for memory in prediction.values() for phase in memory.values())


def _say_whether_it_fits(recipe: Recipe, own: Prediction, device_memory: int) -> None:
    peak, room = _peak(own), bytes_text(device_memory)
    stage = max(own, key=lambda name: max(phase.peak for phase in own[name].values()))
    verdict = "[green]It fits[/]" if peak <= device_memory else "[red]It does not fit[/]"
    console.print(
        f"{verdict}: {recipe.name} ({recipe.tuning}) needs {bytes_text(peak)} of {room}, most of all in {stage}. "
        "These are the bytes of live tensors; the CUDA context and fragmentation take about 1 GB more."
    )


def _table(label: str, prediction: Prediction, devices: int, device_memory: int | None) -> Table:
    where = f", each of {devices} devices (ZeRO-3 or FSDP)" if devices > 1 else ""
    table = Table(title=f"{label}{where}", padding=(0, 1, 0, 0))
    for column in ("stage", "phase", "peak", *SHORT.values()):
        table.add_column(column, no_wrap=True, justify="left" if column in ("stage", "phase") else "right")
    for stage, memory in prediction.items():
        for phase, peak in memory.items():
            too_much = device_memory is not None and peak.peak > device_memory
            cells = [bytes_text(peak.kinds[kind]) if kind in peak.kinds else "" for kind in SHORT]
            table.add_row(stage, phase, bytes_text(peak.peak), *cells, style="red" if too_much else None)
    return table
