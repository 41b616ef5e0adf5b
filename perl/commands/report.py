"""`report`: one page about runs."""

from pathlib import Path
from typing import Annotated

import typer

from perl.commands.options import say_loading
from perl.system.progress import console


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page; report.html in the first run by default."),
    ] = None,
) -> None:
    """Write the HTML page of runs of one recipe, finished or not: its seeds, under one tuning or both."""
    say_loading()
    from perl.report.page import write_page

    console.print(f"Written: {write_page(runs, out or runs[0] / 'report.html')}", markup=False)
