"""The command line. Exit codes: 0 success, 2 error in the user's input, 130 interrupted, 1 anything else."""

import io
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, NoReturn

import typer

from perl import __version__
from perl.commands import (
    algorithms,
    bench,
    chat,
    compare,
    compare_runs,
    data,
    estimate,
    evaluate,
    export,
    generate,
    init,
    keys,
    rate,
    sampler,
    score,
    serve,
)
from perl.commands import report as report_command
from perl.commands import run as stages
from perl.commands import sweep as sweep_command
from perl.errors import UserError, machine_fault
from perl.parallel.launcher import ranks, skips_finalization
from perl.system.allocator import keep_freed_memory
from perl.system.child import stop_with_parent
from perl.system.progress import console
from perl.system.signals import handle

INTERRUPTED = 130
Command = Callable[..., None]
LAUNCHABLE: dict[str, Command] = {
    "run": stages.run,
    "sft": stages.sft,
    "reward": stages.reward,
    "rl": stages.rl,
}
"""Commands that several processes may run together."""
COMMANDS: dict[str, Command] = LAUNCHABLE | {
    "init": init.init,
    "algorithms": algorithms.algorithms,
    "evaluate": evaluate.evaluate,
    "compare": compare.compare,
    "compare-runs": compare_runs.compare_runs,
    "sweep": sweep_command.sweep,
    "estimate": estimate.estimate,
    "report": report_command.report,
    "bench": bench.bench,
    "export": export.export,
    "chat": chat.chat,
    "keys": keys.keys,
    "generate": generate.generate,
    "score": score.score,
    "rate": rate.rate,
    "serve": serve.serve,
    "sampler": sampler.sampler,
}
RESUMABLE = {*LAUNCHABLE, "compare", "sweep"}
"""Commands that resume where they were interrupted."""

app = typer.Typer(
    name="perl-rlhf",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Fetch, import and check data.", no_args_is_help=True)
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(data_app, name="data")
data_app.command("fetch")(data.data_fetch)
data_app.command("import")(data.data_import)
data_app.command("check")(data.data_check)
data_app.command("leaks")(data.data_leaks)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"perl-rlhf {__version__}")
        raise typer.Exit


@app.callback(help="RLHF in which every trained part is an adapter on one frozen base.")
def before_any(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Refuse to let a launcher run a command in several processes that would all write to the same place."""
    (rank, count, _), command = ranks(), context.invoked_subcommand
    if count > 1 and command not in LAUNCHABLE:
        if rank:
            raise typer.Exit(UserError.status)
        raise UserError(
            f"{command} runs in one process, but a launcher has started {count}",
            where=f"the command {command}",
            remedy=f"Run perl-rlhf {command} without a launcher; {', '.join(LAUNCHABLE)} can be launched.",
        )


@skips_finalization
def main() -> None:
    """Run a command; turn an error into one message and an exit code."""
    handle((signal.SIGTERM, signal.SIGHUP), _interrupt)
    stop_with_parent()
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding without dashes, say, gets escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # click's own errors exit with code 2 and one message, as ours do.
        app(standalone_mode=True)
    except UserError as error:
        _leave(error)
    except (KeyboardInterrupt, SystemExit) as leaving:
        # typer turns KeyboardInterrupt into an exit without a message
        if isinstance(leaving, SystemExit) and leaving.code != INTERRUPTED:
            raise
        console.print(f"interrupted: {_kept(sys.argv[1:])}")
        sys.exit(INTERRUPTED)
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        _leave(fault)


def _leave(error: UserError) -> NoReturn:
    console.print(f"error: {error}", style="red", markup=False)
    sys.exit(error.status)


def _kept(arguments: list[str]) -> str:
    """Return what an interrupted command has kept."""
    if RESUMABLE.intersection(arguments[:1]):
        return "finished stages are saved; run the same command again to continue"
    if arguments[:1] == ["rate"]:
        return "all ratings that the page showed as saved are in the file; run the same command to continue"
    if arguments[:1] == ["serve"]:
        return "no more requests are answered; run the same command to serve again"
    return "nothing was saved; the same command starts from the beginning"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
