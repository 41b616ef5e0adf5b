"""The rows of a user's file, whatever its form: JSON Lines, a JSON array, CSV, TSV or Parquet.

In CSV and TSV all is text: a cell of `label`, `margin` or `probability` is read as a number or as one of the words
for up and down, and an empty cell is none. Columns of other names than those of TRL's formats are read by names
that the user gives, and these can be guessed.
"""

import contextlib
import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from perl.data.rows import (
    MAX_LINE_BYTES,
    Row,
    RowError,
    line_value,
    numbered_lines,
    object_with,
    parsed,
    strict_json,
)
from perl.errors import UserError

Value = Callable[[], object]
"""The row; raises `RowError`."""
UP = ("true", "yes", "up", "thumbs up", "thumbs_up", "good", "positive", "like", "liked", "👍")
DOWN = (
    "false",
    "no",
    "down",
    "thumbs down",
    "thumbs_down",
    "bad",
    "negative",
    "dislike",
    "disliked",
    "-1",
    "-1.0",
    "👎",
)
NUMBERS = ("label", "margin", "probability")
ANSWERS = ("completion", "chosen", "rejected")
"""They may be JSON that is no chat, as a schema asks for."""
READ = "JSON Lines (.jsonl), a JSON array (.json), CSV (.csv), TSV (.tsv) and Parquet (.parquet) are read"
REFUSED = (".xlsx", ".xls", ".ods", ".zip", ".tar", ".arrow", ".feather", ".pkl", ".pickle", ".docx", ".pdf")
TRL_FORMATS = [
    {"prompt"},
    {"prompt", "completion"},
    {"messages"},
    {"prompt", "completion", "label"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
]
"""The fields of each."""
UNREAD = "These columns are not read"
"""How a note begins of columns that have other names than those."""
SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "request", "user"),
    "completion": ("response", "answer", "output", "reply", "generation"),
    "label": ("rating", "thumb", "thumbs", "thumbs_up", "feedback", "vote", "liked", "score", "is_good"),
    "chosen": ("preferred", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser"),
}
"""Other names that the fields have in people's files."""


def numbered_values(path: Path, columns: Mapping[str, str], form: str = "") -> Iterator[tuple[int, Value]]:
    """Each row of a file, by its line or its number from 1.

    Args:
        columns: names in the file, by the names of TRL's formats.
        form: such as .csv, whatever the file's name.

    Raises:
        UserError: the file is of a form that is not read, or broken.
        OSError: it cannot be read.
    """
    suffix = form or path.suffix.lower()
    if suffix in REFUSED:
        raise UserError(f"{suffix} files are not read", where=str(path), remedy=f"Convert it: {READ}.")
    read = {".csv": _cells, ".tsv": _cells, ".parquet": _parquet}.get(suffix, _json)
    for number, value in read(path):
        yield number, lambda value=value: _renamed(value(), columns)  # type: ignore[misc]


def numbered_rows(rows: Iterable[Mapping[str, object]], columns: Mapping[str, str]) -> Iterator[tuple[int, Value]]:
    """Each row of a table in memory, by its number from 1; a column that a row lacks is null in it.

    Args:
        columns: as of `numbered_values`.
    """
    for number, row in enumerate(rows, 1):
        yield number, lambda row=row: _renamed(_with_values(row), columns)  # type: ignore[misc]


def _renamed(value: object, columns: Mapping[str, str]) -> object:
    if not columns:
        return value
    row, named = object_with(value), set(columns.values())
    kept = {name: one for name, one in row.items() if name not in named and name not in columns}
    return kept | {field: cell_value(field, row[name]) for field, name in columns.items() if name in row}


def _json(path: Path) -> Iterator[tuple[int, Value]]:
    """JSON Lines, or a JSON array."""
    with path.open("rb") as file:
        first = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first != b"[":
        for number, line in numbered_lines(path):
            yield number, lambda line=line: line_value(line)  # type: ignore[misc]
        return
    try:
        rows = strict_json(path.read_text(encoding="utf-8-sig"))
    except (RowError, UnicodeDecodeError) as error:
        remedy = "It begins with [ and so is read as one array: mend it, or write one object a line."
        raise UserError(f"is not a JSON array: {error}", where=str(path), remedy=remedy) from None
    assert isinstance(rows, list)
    for number, row in enumerate(rows, 1):
        yield number, lambda row=row: row  # type: ignore[misc]


def _parquet(path: Path) -> Iterator[tuple[int, Value]]:
    arrow: Any = import_module("pyarrow")  # it has no types
    parquet: Any = import_module("pyarrow.parquet")
    try:
        rows = parquet.read_table(path).to_pylist()
    except arrow.ArrowInvalid as error:
        raise UserError(f"is not a Parquet file: {error}", where=str(path), remedy="Write it again.") from None
    yield from numbered_rows(rows, {})


def _with_values(row: Mapping[str, object]) -> Row:
    """A row of a table without the columns that are null in it."""
    plain = {name: _plain(value) for name, value in row.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: object) -> object:
    """A value as JSON has it: dates, decimals and bytes as text; NaN, which tables have for no value, as null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def _cells(path: Path) -> Iterator[tuple[int, Value]]:
    for number, header, cells in csv_rows(path):
        yield number, lambda header=header, cells=cells: _values(row_of(header, cells))  # type: ignore[misc]


def _values(row: Mapping[str, str]) -> Row:
    return {name: cell_value(name, text) for name, text in row.items()}


def csv_rows(path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """The header of a CSV or TSV file beside the cells of each row, by the row's last line.

    Raises:
        UserError: it is none.
        OSError: it cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            if len(header) == 1 and ";" in header[0]:  # as Excel has it in Europe
                what, remedy = "its columns are divided by semicolons", "Save it with commas, or as TSV."
                raise UserError(what, where=str(path), remedy=remedy)
            if twice := [name for name in header if name and header.count(name) > 1]:
                what = f"has the column {twice[0]!r} twice"
                raise UserError(what, where=str(path), remedy="Name every column once.")
            for cells in filter(None, rows):  # a blank line has no cells
                yield rows.line_num, header, cells
        except csv.Error as error:
            where = f"{path}:{rows.line_num}"
            raise UserError(f"is not valid CSV: {error}", where=where, remedy="Correct this row.") from None
        except UnicodeDecodeError as error:
            what, remedy = f"is not UTF-8: byte 0x{error.object[error.start]:02x}", "Save it as UTF-8."
            raise UserError(what, where=str(path), remedy=remedy) from None


def row_of(header: Sequence[str], cells: Sequence[str]) -> Mapping[str, str]:
    """A row of text; an empty cell is none. Raises `RowError` if a column has no cell, or a cell no column."""
    if len(cells) != len(header):
        raise RowError("has more cells than the header, or fewer: a text with commas has to be in quotes")
    return {name: text for name, text in zip(header, cells, strict=True) if text}


def cell_value(name: str, cell: object) -> object:
    """What a cell of text says, where a number or a label is expected; messages are JSON in a cell."""
    if not isinstance(cell, str):
        return cell
    word = cell.strip().casefold()
    if name == "label" and word in (*UP, *DOWN):
        return word in UP
    with contextlib.suppress(ValueError):
        if name in NUMBERS:
            return float(word)
        if word.startswith("[{"):
            value: object = json.loads(cell)
            return cell if name in ANSWERS and not _are_messages(value) else value
    return cell


def _are_messages(value: object) -> bool:
    """Whether a list is of chat messages."""
    wanted = {"role", "content"}
    return isinstance(value, list) and all(isinstance(one, dict) and wanted <= set(one) for one in value)


# What `data.columns` could say.


def columns_in(path: Path) -> dict[str, str]:
    """What `data.columns` could say of a file whose columns have other names than the formats'; mostly nothing.

    Raises:
        UserError: it is of a form that is not read, or broken.
    """
    names, count = Counter[str](), 0
    with contextlib.suppress(OSError):  # whoever reads its rows says so
        for _, value in numbered_values(path, {}):
            row = parsed("", value)
            names.update(list(row) if isinstance(row, dict) else [])
            count += 1
    return mapping_of(names, count)


def mapping_of(names: Counter[str], rows: int) -> dict[str, str]:
    """What `data.columns` could say of a file: the richest format that it then has, if any.

    Args:
        names: its columns; those count that most of its rows have.
        rows: how many it has.
    """
    most = [name for name, count in names.items() if 2 * count > rows]
    lower = {name.casefold(): name for name in most}
    found = {}
    for field, others in SYNONYMS.items():
        if field not in most and (other := next((lower[one] for one in others if one in lower), None)):
            found[field] = other
    for fields in sorted(TRL_FORMATS, key=len, reverse=True):
        if fields <= {*most, *found} and not fields <= set(most):
            return {field: name for field, name in found.items() if field in fields}
    return {}


def mapping_hint(mapping: Mapping[str, str]) -> str:
    """What to add to the recipe so that columns of other names are read; empty if there are none."""
    if not mapping:
        return ""
    said = ", ".join(f"{field}: {name}" for field, name in mapping.items())
    return f"{UNREAD}: {', '.join(mapping.values())}. To read them, add data.columns: {{{said}}}"
