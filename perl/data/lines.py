"""JSON Lines, plain or gzipped: the lines of a file with their numbers, and one line as a value."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from perl.data.rows import RowError, shown, strict_json
from perl.errors import UserError, machine_fault

MAX_LINE_BYTES = 10_000_000
"""Longer lines are a `Problem`: some other file, or one whose newlines were lost."""


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1; of a line that is too long only its beginning.

    Raises:
        UserError: the file is missing, a folder, unreadable, or not the gzip file that its name promises.
    """
    try:
        with _open(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = line
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError("there is no such file", where=str(path), remedy="Check data.path.") from None
    except IsADirectoryError:
        remedy = "Set data.path to a .jsonl file, or data.source to the source whose folder this is."
        raise UserError("is a folder; a file expected", where=str(path), remedy=remedy) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "Get the file again, or take .gz off its name if it is not compressed."
        raise UserError(f"is not a whole gzip file: {error}", where=str(path), remedy=remedy) from None
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        what = f"cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        raise machine_fault(error) or UserError(what, where=str(path), remedy="Check data.path.") from None


def line_value(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        RowError: it is too long, not UTF-8 or JSON, has a field twice, or is nested too deeply.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RowError(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}") from None
    if "\0" in text:
        raise RowError("the line holds NUL bytes")
    value = strict_json(text)
    json.loads(text, object_pairs_hook=_refuse_repeated)
    return value


def _open(path: Path) -> IO[bytes]:
    # GzipFile is no IO by its type, but has all that is used here.
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _refuse_repeated(fields: list[tuple[str, Any]]) -> None:
    """JSON lets a later field overwrite an earlier one in silence: a row could have both labels."""
    names: set[str] = set()
    for name, _ in fields:
        if name in names:
            raise RowError(f"the field {shown(name)} stands there twice")
        names.add(name)
