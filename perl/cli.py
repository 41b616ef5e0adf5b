"""The command line. Exit status: 0 done, 2 the user's input is wrong, 130 interrupted, 1 anything else."""

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from perl.errors import UserError, machine_fault
from perl.parallel.launcher import ranks, skips_finalization
from perl.system.allocator import keep_freed_memory
from perl.system.progress import console
from perl.system.signals import handle

INTERRUPTED = 130
TOGETHER = ("run", "sft", "reward", "rl")
"""The commands that several processes run together."""

app = typer.Typer(
    name="perl-rlhf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Fetch and check data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as rl.algorithm=ppo.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; runs/NAME by default.")]
JsonFile = typer.Option("--json", metavar="FILE", help="Write the metrics there.")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


@app.callback(help="RLHF in which every learned part is a LoRA adapter on one frozen base.")
def before_any(context: typer.Context) -> None:
    """Refuse what a launcher would have every process do anew, all writing to the same place."""
    (rank, count, _), command = ranks(), context.invoked_subcommand
    if count > 1 and command not in TOGETHER:
        if rank:
            raise typer.Exit(UserError.status)
        raise UserError(
            f"{command} is for one process, and a launcher has started {count}",
            where=f"the command {command}",
            remedy=f"Call perl-rlhf {command} without a launcher; {', '.join(TOGETHER)} can be launched.",
        )


@app.command("run")
def run_command(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Run the recipe's stages in order; called again, go on with the first unfinished one."""
    _run(recipe, overrides, out)


@app.command("sft")
def sft_command(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Supervised fine-tuning on demonstrations."""
    _run(recipe, overrides, out, "sft")


@app.command("reward")
def reward_command(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Train the reward model on thumbs or pairs."""
    _run(recipe, overrides, out, "reward")


@app.command("rl")
def rl_command(recipe: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
    """Train the policy against the reward."""
    _run(recipe, overrides, out, "rl")


@app.command("evaluate")
def evaluate_command(
    run: Run,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="reward or policy.")],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE[:PATH]", help="A source or a file; the run's own by default."),
    ] = None,
    json_file: Annotated[Path | None, JsonFile] = None,
) -> None:
    """Judge a trained reward model on rated data, or a policy on prompts."""
    from perl.commands.evaluate import evaluate

    evaluate(run, role, data, json_file)


@app.command("compare")
def compare_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Runs of each tuning.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=3, help="Measure memory and speed alone, over N steps a stage."),
    ] = None,
) -> None:
    """Run the recipe under LoRA and under full tuning: memory, speed and quality side by side."""
    from perl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from perl.commands.compare import compare, compare_costs

    folder = out or Path("runs") / f"{loaded.name}-compare"
    with _writing(folder):
        if steps is not None:
            compare_costs(loaded, steps, folder)
        else:
            compare(loaded, folder, seeds)


@app.command("sweep")
def sweep_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    ranks: Annotated[str, typer.Option("--ranks", metavar="R,R", help="Ranks of the adapters.")] = "1,2,4,8,16",
    targets: Annotated[
        str, typer.Option("--targets", metavar="T,T", help="Where they are: attention, all-linear.")
    ] = "attention,all-linear",
    seeds: Annotated[str, typer.Option("--seeds", metavar="S,S", help="Seeds of every setting.")] = "0,1,2",
    full: Annotated[bool, typer.Option("--full/--no-full", help="Full tuning beside them.")] = True,
) -> None:
    """Train the reward model at several ranks and placements of its adapters, and whole, over seeds."""
    from perl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from perl.commands.sweep import parse_list, sweep

    folder = out or Path("runs") / f"{loaded.name}-sweep"
    with _writing(folder):
        sweep(
            loaded,
            folder,
            parse_list("--ranks", ranks, int),
            parse_list("--targets", targets, str),
            parse_list("--seeds", seeds, int),
            full,
        )


@app.command("estimate")
def estimate_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device_memory: Annotated[
        str | None, typer.Option("--device-memory", metavar="SIZE", help="What one device has, such as 24GB.")
    ] = None,
    devices: Annotated[
        int, typer.Option("--devices", metavar="N", min=1, help="Shard over so many (ZeRO-3 or FSDP).")
    ] = 1,
    json_file: Annotated[Path | None, JsonFile] = None,
) -> None:
    """Predict peak memory by stage and phase, without loading weights; say what to change if it does not fit."""
    from perl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from perl.commands.estimate import estimate, parse_bytes

    estimate(loaded, parse_bytes(device_memory) if device_memory else None, devices, json_file)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The page; report.html in the only or the first run by default."
        ),
    ] = None,
) -> None:
    """Write the HTML page of finished runs: seeds of one recipe, under one tuning or both."""
    from perl.report.page import write_page

    console.print(f"Written: {write_page(runs, out or runs[0] / 'report.html')}", markup=False)


@app.command("bench")
def bench_command(
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
    json_file: Annotated[Path | None, JsonFile] = None,
) -> None:
    """Time a PPO step and its memory under LoRA and full tuning, and TRL's beside it; or a part of it."""
    _one_of("--layers", layers, ["all", "top-half"])
    from perl.bench import work
    from perl.commands.bench import READS, bench_part, bench_step, refuse_unread

    _one_of("--model", model, list(work.MODELS))
    _one_of("PART", part, list(READS))
    sources = {name: context.get_parameter_source(name) for name in context.params}
    refuse_unread(part, [name for name, source in sources.items() if source and source.name == "COMMANDLINE"])
    if part == "step":
        bench_step(model, layers, epochs, repeats, steps, checkpointing, peer_trl, json_file)
    else:
        bench_part(part, model, layers, repeats, figure, json_file)


@app.command("export")
def export_command(
    run: Run,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="sft, reward, policy or critic.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="The whole model, adapter and base merged.")] = False,
) -> None:
    """Write a role as an adapter that plain peft loads, or a model that plain transformers loads."""
    from perl.commands.export import export

    export(run, role, folder, merge)


@app.command("chat")
def chat_command(run: Run) -> None:
    """Talk to base, SFT and RL policy side by side."""
    from perl.commands.chat import chat

    chat(run)


@data_app.command("fetch")
def fetch_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Such as taskmaster-coffee.")],
) -> None:
    """Download a source, checked against pinned hashes."""
    from perl.data.sources import fetch_source

    console.print(f"{source} is in {fetch_source(source)}", markup=False)


@data_app.command("check")
def check_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE[:PATH]", help="A source, a JSONL file or a recipe.")],
) -> None:
    """Describe a source or file, and name every bad row."""
    from perl.commands.data_check import check

    raise typer.Exit(check(source))


@skips_finalization
def main() -> None:
    """Run a command and turn what goes wrong into one message and an exit status."""
    handle((signal.SIGTERM, signal.SIGHUP), _interrupt)
    keep_freed_memory()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a terminal or pipe that has no dashes, say, gets what it can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # click's own errors leave with status 2 and one message, as ours do.
        app(standalone_mode=True)
    except UserError as error:
        _leave(error)
    except (KeyboardInterrupt, SystemExit) as leaving:
        # typer itself turns KeyboardInterrupt into an exit without a word
        if isinstance(leaving, SystemExit) and leaving.code != INTERRUPTED:
            raise
        console.print("interrupted: finished stages are saved; run the same command again to go on")
        sys.exit(INTERRUPTED)
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        _leave(fault)


def _leave(error: UserError) -> NoReturn:
    console.print(f"error: {error}", style="red", markup=False)
    sys.exit(error.status)


def _one_of(option: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise UserError(f"{value!r} is none of {', '.join(choices)}", where=option, remedy="Choose one of them.")


def _run(recipe: Path, overrides: list[str] | None, out: Path | None, stage: Any = None) -> None:
    from perl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    # After the recipe is read: torch and transformers take seconds to import, a typo should not wait for them.
    from perl.commands.run import run
    from perl.parallel.process_group import process_group

    folder = out or Path("runs") / loaded.name
    with _writing(folder), process_group() as engine:
        run(loaded, folder, [stage] if stage else None, engine=engine)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Inside, a failed write names at least this folder: the system does not say which file had no room."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
