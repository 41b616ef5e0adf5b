"""JSON Lines that commands read and write, a line for a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from perl.data.jsonl import parse_row
from perl.data.records import Record
from perl.data.rows import Row, RowError, line_value, no_usable_row, numbered_lines, object_with
from perl.errors import UserError
from perl.system.files import user_named, write_whole

FILE = "JSON Lines, as `data check` describes them."
Lines = Annotated[Path, typer.Argument(metavar="FILE", help=FILE)]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write there; to stdout by default.")]
REMEDY = "Correct or remove that line: what is written has a line for each line read."


def read_records(file: Path) -> list[tuple[str, Row, Record]]:
    """The lines of a file: where each stands, its fields, and the record that it is.

    Raises:
        UserError: a line fits no format, the file is empty, or there is none.
    """
    records = []
    try:
        for number, line in numbered_lines(file):
            where = f"{file}:{number}"
            try:
                row = object_with(line_value(line))
                records.append((where, row, parse_row(row)[0]))
            except RowError as error:
                raise UserError(str(error), where=where, remedy=REMEDY) from None
    except OSError as error:
        remedy = "Name a file of JSON Lines."
        raise UserError(f"cannot be read: {error.strerror}", where=str(file), remedy=remedy) from None
    if not records:
        raise no_usable_row([], str(file), "Give a line for each completion or prompt.")
    return records


def write_lines(out: Path | None, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows to the user's file, whole, or to stdout. Raises `UserError` if it cannot be written."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    if out is None:
        print(text, end="")
        return
    with user_named(out):
        write_whole(out, text)
