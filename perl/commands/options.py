"""Arguments and options that several commands share, and checks of their values."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from perl.data.records import Problem
from perl.errors import UserError
from perl.recipe.data import COLUMNS
from perl.recipe.section import nearest
from perl.system.progress import console

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as rl.algorithm=ppo.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; runs/NAME by default.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the metrics to this file.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns", metavar="FIELD=NAME,…", help="Names of columns in the file: prompt=question,completion=reply."
    ),
]
Port = Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any free port.")]
Host = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Any address but loopback's lets others connect.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
SHOWN_PROBLEMS = 50


def one_of(option: str, value: str, choices: list[str]) -> None:
    """Check a choice.

    Raises:
        UserError: the value is not among the choices.
    """
    if value not in choices:
        raise UserError(f"{value!r} is not one of {', '.join(choices)}", where=option, remedy="Choose one.")


def parse_columns(given: list[str] | None) -> dict[str, str]:
    """Parse column names in a file, by field name of TRL's formats; a name may contain commas.

    Raises:
        UserError: an entry is not FIELD=NAME, or there is no such field.
    """
    columns = {}
    for entry in (one for text in given or () for one in re.split(r",(?=\w+=)", text)):
        field, _, name = entry.partition("=")
        if not name:
            raise UserError(f"{entry!r} is not FIELD=NAME", where="--columns", remedy="As in prompt=question.")
        if field not in COLUMNS:
            raise UserError(f"a row has no field {field!r}", where="--columns", remedy=nearest(field, COLUMNS))
        columns[field] = name
    return columns


def say_loading(what: str = "") -> None:
    """Print that libraries are being loaded: importing torch and what depends on it takes seconds."""
    console.print(f"{what}Loading the libraries …", markup=False)


def print_problems(console: Console, problems: Sequence[Problem]) -> None:
    """Print the first bad rows and the number of others."""
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"{problem.where}: {problem.what}", markup=False)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"… and {len(problems) - SHOWN_PROBLEMS:,} more")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name this folder in errors of writes inside, because the system does not name a file that had no room."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
