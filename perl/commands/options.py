"""What the commands' signatures share, and how they check them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from perl.errors import UserError
from perl.system.progress import console

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as rl.algorithm=ppo.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; runs/NAME by default.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the metrics there.")]
Port = Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any that is free.")]
Host = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Another than the loopback's lets others in.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def one_of(option: str, value: str, choices: list[str]) -> None:
    """Check a choice.

    Raises:
        UserError: the value is not among the choices.
    """
    if value not in choices:
        raise UserError(f"{value!r} is none of {', '.join(choices)}", where=option, remedy="Choose one of them.")


def say_loading(what: str = "") -> None:
    """The first words on the screen: importing torch and what is built on it takes seconds."""
    console.print(f"{what}Loading the libraries …", markup=False)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, a failed write names at least this folder: the system does not say which file had no room."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
