"""`data import`: ratings that people gave elsewhere, as JSON Lines."""

from pathlib import Path
from typing import Annotated

import typer

from perl.commands.json_lines import Out, write_lines
from perl.commands.options import one_of
from perl.data.imports import FORMATS, Columns, read_import
from perl.data.rows import no_usable_row, sifted
from perl.system.progress import console, counted

SHOWN_PROBLEMS = 50


def data_import(
    source: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{', '.join(FORMATS)}.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What was exported.")],
    prompt: Annotated[str, typer.Option(metavar="COLUMN", help="csv: the prompt.")] = Columns.prompt,
    completion: Annotated[str, typer.Option(metavar="COLUMN", help="csv: the completion.")] = Columns.completion,
    label: Annotated[str, typer.Option(metavar="COLUMN", help="csv: the rating.")] = Columns.label,
    chosen: Annotated[str, typer.Option(metavar="COLUMN", help="csv: the better of two.")] = Columns.chosen,
    rejected: Annotated[str, typer.Option(metavar="COLUMN", help="csv: the worse of two.")] = Columns.rejected,
    out: Out = None,
) -> None:
    """Write ratings exported elsewhere as JSON Lines, and name every row that holds none."""
    one_of("FORMAT", source, list(FORMATS))
    columns = Columns(prompt, completion, label, chosen, rejected)
    rows, problems = sifted(read_import(source, file, columns))
    if not rows:
        raise no_usable_row(problems, str(file), f"Give a file of the format {source}: data/README.md has them.")
    write_lines(out, rows)
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"{problem.where}: {problem.what}", markup=False)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"… and {len(problems) - SHOWN_PROBLEMS:,} more")
    console.print(f"{counted(len(rows), 'row')} imported, {len(problems):,} left out")
