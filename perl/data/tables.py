"""Reads the rows of a user's file of any form: JSON Lines, a JSON array, CSV, TSV or Parquet.

In CSV and TSV everything is text: a cell of `label`, `margin` or `probability` is read as a number, and an empty
cell has no value. In every form, `label` may be a word for up or down. If the columns have other names than the
fields of TRL's formats, the user maps them; a mapping can be suggested.
"""

import ast
import codecs
import contextlib
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

from perl.data.rows import (
    MAX_LINE_BYTES,
    Row,
    RowError,
    label_value,
    line_value,
    numbered_lines,
    object_with,
    opened,
    parsed,
    strict_json,
)
from perl.errors import UserError

Value = Callable[[], object]
"""Returns the row; raises `RowError`."""
NUMBERS = ("label", "margin", "probability")
_PYTHON = re.compile(r"\s*\[\{'(role|content)': ")
"""Beginning of a list of messages as pandas writes it into a cell."""
TEXTS = ("prompt", "completion", "chosen", "rejected")
"""Fields whose text may be JSON without being a chat, for example if a schema asks for JSON."""
READ = "JSON Lines (.jsonl), a JSON array (.json), CSV (.csv), TSV (.tsv) and Parquet (.parquet) are supported"
REFUSED = (".xlsx", ".xls", ".ods", ".zip", ".tar", ".arrow", ".feather", ".pkl", ".pickle", ".docx", ".pdf")
TRL_FORMATS = [
    {"prompt"},
    {"prompt", "completion"},
    {"messages"},
    {"prompt", "completion", "label"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
]
"""The fields of each format."""
UNREAD = "These columns are not read"
"""Beginning of the note on columns with other names."""
SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "request", "user"),
    "completion": ("response", "answer", "output", "reply", "generation"),
    "label": ("rating", "thumb", "thumbs", "thumbs_up", "feedback", "vote", "liked", "score", "is_good"),
    "chosen": ("preferred", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser"),
}
"""Other common names of the fields."""


def numbered_values(path: Path, columns: Mapping[str, str], form: str = "") -> Iterator[tuple[int, Value]]:
    """Yield each row of a file with its line number or its index from 1.

    Args:
        columns: the file's column names, by the field names of TRL's formats.
        form: a suffix such as .csv that overrides the file's own.

    Raises:
        UserError: the file's form is not supported, or it is broken.
        OSError: it cannot be read.
    """
    suffix = form or path.suffix.lower()
    if suffix == ".gz" and (packed := Path(path.stem).suffix.lower()) in (".csv", ".tsv", ".parquet"):
        raise UserError(
            f"compressed {packed} files are not supported", where=str(path), remedy="Unpack it with gunzip."
        )
    if suffix in REFUSED:
        raise UserError(f"{suffix} files are not supported", where=str(path), remedy=f"Convert it: {READ}.")
    read = {".csv": _cells, ".tsv": _cells, ".parquet": _parquet}.get(suffix, _json)
    for number, value in read(path):
        yield number, lambda value=value: _renamed(value(), columns, read is _cells)  # type: ignore[misc]


def numbered_rows(rows: Iterable[Mapping[str, object]], columns: Mapping[str, str]) -> Iterator[tuple[int, Value]]:
    """Yield each row of a table in memory with its number from 1; null means that the row lacks the column.

    Args:
        columns: the mapping of `numbered_values`.
    """
    for number, row in enumerate(rows, 1):
        yield number, lambda row=row: _renamed(_with_values(row), columns)  # type: ignore[misc]


def _renamed(value: object, columns: Mapping[str, str], cells: bool = False) -> object:
    """Return a row by the formats' names; values that are stored as text, such as chats, are converted.

    Args:
        cells: whether all values are cells of text, of which those of other columns are converted too.
    """
    if not columns and not isinstance(value, dict):
        return value
    row, named = object_with(value), set(columns.values())
    kept = {name: one for name, one in row.items() if name not in named and name not in columns}
    kept |= {field: row[name] for field, name in columns.items() if name in row}
    converted = kept if cells else {*TEXTS, "messages", *columns}
    return {name: cell_value(name, one) if name in converted else one for name, one in kept.items()}


def _json(path: Path) -> Iterator[tuple[int, Value]]:
    """Read JSON Lines or a JSON array."""
    with opened(path) as file:
        first = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first != b"[":
        for number, line in numbered_lines(path):
            yield number, lambda line=line: line_value(line)  # type: ignore[misc]
        return
    try:
        with opened(path) as file:
            rows = strict_json(file.read().decode("utf-8-sig"))
    except (RowError, UnicodeDecodeError) as error:
        remedy = "It begins with [ and so is read as one array: correct it, or write one object per line."
        raise UserError(f"is not a JSON array: {error}", where=str(path), remedy=remedy) from None
    assert isinstance(rows, list)
    for number, row in enumerate(rows, 1):
        yield number, lambda row=row: row  # type: ignore[misc]


def _parquet(path: Path) -> Iterator[tuple[int, Value]]:
    arrow: Any = import_module("pyarrow")  # untyped
    parquet: Any = import_module("pyarrow.parquet")
    try:
        rows = parquet.read_table(path).to_pylist()
    except arrow.ArrowInvalid as error:
        raise UserError(f"is not a Parquet file: {error}", where=str(path), remedy="Write it again.") from None
    yield from numbered_rows(rows, {})


def _with_values(row: Mapping[str, object]) -> Row:
    """Return a row of a table without its null columns."""
    plain = {name: _plain(value) for name, value in row.items()}
    plain |= {name: float(value) for name, value in row.items() if name in NUMBERS and isinstance(value, Decimal)}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: object) -> object:
    """Return a value as JSON: dates and decimals as text, bytes as UTF-8 if possible, NaN (missing) as null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    return value if value is None or isinstance(value, str | int) else str(value)


def _cells(path: Path) -> Iterator[tuple[int, Value]]:
    for number, header, cells in csv_rows(path):
        yield number, lambda header=header, cells=cells: row_of(header, cells)  # type: ignore[misc]


def csv_rows(path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield the last line number, the header and the cells of each row of a CSV or TSV file.

    Spreadsheets also write semicolons or tabs into .csv files, and UTF-16 with a byte order mark.

    Raises:
        UserError: it is not such a file.
        OSError: it cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open("rb") as binary:
        encoding = "utf-16" if binary.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with path.open(encoding=encoding, newline="") as file:
        try:
            names = file.readline()
            file.seek(0)
            separator = max(",;\t", key=names.count)
            rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else separator, strict=True)
            header = [name.strip() for name in next(rows, [])]
            if twice := [name for name in header if name and header.count(name) > 1]:
                what = f"has the column {twice[0]!r} twice"
                raise UserError(what, where=str(path), remedy="Give every column a different name.")
            for cells in filter(None, rows):  # a blank line has no cells
                yield rows.line_num, header, cells
        except csv.Error as error:
            where = f"{path}:{rows.line_num}"
            raise UserError(f"is not valid CSV: {error}", where=where, remedy="Correct this row.") from None
        except UnicodeDecodeError as error:
            what = f"is not {encoding.removesuffix('-sig').upper()}: byte 0x{error.object[error.start]:02x}"
            remedy = "Save it as UTF-8."
            raise UserError(what, where=str(path), remedy=remedy) from None


def row_of(header: Sequence[str], cells: Sequence[str]) -> Mapping[str, str]:
    """Return a row without empty cells. Raises `RowError` if a column has no cell, or a cell no column."""
    if len(cells) != len(header):
        raise RowError("has more or fewer cells than the header: text with separators must be in quotes")
    return {name: text for name, text in zip(header, cells, strict=True) if text}


def cell_value(name: str, cell: object) -> object:
    """Convert a text cell to a number or label if its field has one, or to messages if it has them as JSON."""
    if not isinstance(cell, str):
        return cell
    if name == "label":
        return label_value(cell)
    with contextlib.suppress(ValueError):
        if name in NUMBERS:
            return float(cell)
        if cell.lstrip().startswith("[{"):
            value: object = json.loads(cell)
            return cell if name in TEXTS and not _has_messages(value) else value
    if _PYTHON.match(cell):  # else it would be taken for plain text
        try:
            return ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError):
            raise RowError(f"{name} has messages, but neither as JSON nor as a list in Python") from None
    return cell


def _has_messages(value: object) -> bool:
    """Return whether a value is a list with chat messages; it may have a bad one too, which is refused later."""
    wanted = {"role", "content"}
    return isinstance(value, list) and any(isinstance(one, dict) and wanted <= set(one) for one in value)


# Suggestions for `data.columns`.


def columns_in(path: Path) -> dict[str, str]:
    """Suggest `data.columns` for a file whose columns have other names than the formats' fields; often empty.

    Raises:
        UserError: the file's form is not supported, or it is broken.
    """
    return mapping_of(*_counted(path))


def columns_present(path: Path, columns: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a recipe's `data.columns` whose column a file has; it may use the fields' names.

    Raises:
        UserError: the file's form is not supported, or it is broken.
    """
    names, _ = _counted(path) if columns else (Counter[str](), 0)
    return {field: name for field, name in columns.items() if name in names}


def _counted(path: Path) -> tuple[Counter[str], int]:
    """Return the number of a file's rows that have each column, and the number of rows."""
    names, count = Counter[str](), 0
    with contextlib.suppress(OSError):  # reported when its rows are read
        for _, value in numbered_values(path, {}):
            row = parsed("", value)
            names.update(list(row) if isinstance(row, dict) else [])
            count += 1
    return names, count


def mapping_of(names: Counter[str], rows: int) -> dict[str, str]:
    """Suggest `data.columns` for the format with the most fields that becomes possible; empty if there is none.

    Args:
        names: number of rows with each column; columns that most rows have are used.
        rows: number of rows.
    """
    most = [name for name, count in names.items() if 2 * count > rows]
    lower = {name.casefold(): name for name in most}
    found = {}
    for field, others in SYNONYMS.items():
        if field not in most and (other := next((lower[one] for one in (field, *others) if one in lower), None)):
            found[field] = other
    for fields in sorted(TRL_FORMATS, key=len, reverse=True):
        if fields <= {*most, *found} and not fields <= set(most):
            return {field: name for field, name in found.items() if field in fields}
    return {}


def mapping_hint(mapping: Mapping[str, str]) -> str:
    """Return the note that suggests `data.columns`; empty without a mapping."""
    if not mapping:
        return ""
    said = ", ".join(f"{field}: {name}" for field, name in mapping.items())
    return f"{UNREAD}: {', '.join(mapping.values())}. To read them, add data.columns: {{{said}}}"
