"""`bench`: a PPO step and what it is made of, timed."""

from pathlib import Path
from typing import Annotated

import typer

from perl.commands.options import JsonFile, one_of


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
    from perl.bench import work
    from perl.commands.bench import READS, bench_part, bench_step, refuse_unread

    one_of("--model", model, list(work.MODELS))
    one_of("PART", part, list(READS))
    sources = {name: context.get_parameter_source(name) for name in context.params}
    refuse_unread(part, [name for name, source in sources.items() if source and source.name == "COMMANDLINE"])
    if part == "step":
        bench_step(model, layers, epochs, repeats, steps, checkpointing, peer_trl, json_file)
    else:
        bench_part(part, model, layers, repeats, figure, json_file)
