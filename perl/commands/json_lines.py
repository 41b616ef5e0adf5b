"""JSON Lines that commands read and write, one line per line read."""

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
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write to this file, not to stdout.")]
REMEDY = "Fix or remove that line: every line read gives one line of output."


def read_records(file: Path) -> list[tuple[str, Row, Record]]:
    """Read the lines of a file: the place of each, its fields, and its record.

    A line with an empty completion is read as a prompt.

    Raises:
        UserError: a line fits no format, or the file is empty, missing or a table.
    """
    records = []
    if file.suffix.lower() in (".csv", ".tsv", ".parquet"):
        remedy = f"Convert it: perl-rlhf data import trl {file} --out {file.with_suffix('.jsonl').name}"
        raise UserError(f"{file.suffix} files are not supported here", where=str(file), remedy=remedy)
    try:
        for number, line in numbered_lines(file):
            where = f"{file}:{number}"
            try:
                row = object_with(line_value(line))
                unread = ("completion", "label") if has_empty_completion(row) else ()
                record = parse_row({name: one for name, one in row.items() if name not in unread})[0]
                records.append((where, row, record))
            except RowError as error:
                raise UserError(str(error), where=where, remedy=REMEDY) from None
    except OSError as error:
        remedy = "Name a JSON Lines file."
        raise UserError(f"cannot be read: {error.strerror}", where=str(file), remedy=remedy) from None
    if not records:
        raise no_usable_row([], str(file), "Give one line per completion or prompt.")
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
