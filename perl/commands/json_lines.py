"""Files of rows that commands read, and JSON Lines that they write: one line per row."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from perl.data.jsonl import parse_row
from perl.data.records import Record
from perl.data.rows import Row, RowError, no_usable_row, object_with
from perl.data.tables import numbered_values
from perl.errors import UserError
from perl.system.files import user_named, write_whole

FILE = "Rows, as `data check` describes them."
Lines = Annotated[Path, typer.Argument(metavar="FILE", help=FILE)]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write to this file, not to stdout.")]
REMEDY = "Fix or remove that row: every row read gives one line of output."


def read_records(file: Path) -> list[tuple[str, Row, Record]]:
    """Read the rows of a file: the place of each, its fields, and its record.

    A row with an empty completion is read as a prompt.

    Raises:
        UserError: a row fits no format, or the file is empty, missing or of another form.
    """
    records = []
    try:
        for number, value in numbered_values(file, {}):
            where = f"{file}:{number}"
            try:
                row = object_with(value())
                unread = ("completion", "label") if has_empty_completion(row) else ()
                record = parse_row({name: one for name, one in row.items() if name not in unread})[0]
                records.append((where, row, record))
            except RowError as error:
                raise UserError(str(error), where=where, remedy=REMEDY) from None
    except OSError as error:
        remedy = "Name a file of rows."
        raise UserError(f"cannot be read: {error.strerror}", where=str(file), remedy=remedy) from None
    if not records:
        raise no_usable_row([], str(file), "Give one row per completion or prompt.")
    return records


def has_empty_completion(row: Row) -> bool:
    """Return whether a row's completion is empty text, as `generate` writes it if a role ends immediately."""
    completion = row.get("completion")
    return isinstance(completion, str) and not completion.strip()


def write_lines(out: Path | None, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows atomically to the user's file, or to stdout. Raises `UserError` if it cannot be written."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    if out is None:
        print(text, end="")
        return
    with user_named(out):
        write_whole(out, text)
