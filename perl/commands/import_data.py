"""`data import`: ratings that people gave elsewhere, as JSON Lines."""

from pathlib import Path
from typing import Annotated

import typer

from perl.commands.json_lines import Out, write_lines
from perl.commands.options import Columns, one_of, parse_columns, print_problems
from perl.data.imports import FORMATS, read_import
from perl.data.rows import no_usable_row, sifted
from perl.errors import UserError
from perl.system.progress import console, counted


def data_import(
    source: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{', '.join(FORMATS)}.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What was exported.")],
    columns: Columns = None,
    out: Out = None,
) -> None:
    """Write ratings exported elsewhere as JSON Lines, and name every row that holds none."""
    one_of("FORMAT", source, list(FORMATS))
    names = parse_columns(columns)
    rows, problems = sifted(read_import(source, file, names))
    if not rows:
        raise no_usable_row(problems, str(file), f"Give a file of the format {source}: data/README.md has them.")
    if absent := [name for field, name in names.items() if not any(field in row for row in rows)]:
        raise UserError(f"no row has {', '.join(absent)}", where=str(file), remedy="Correct --columns.")
    write_lines(out, rows)
    print_problems(console, problems)
    console.print(f"{counted(len(rows), 'row')} imported, {len(problems):,} left out")
