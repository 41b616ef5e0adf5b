"""JSON rows for all readers of files: numbered lines, strict parsing, and checks of fields.

A row that cannot be used raises `RowError`, which `parsed` converts to a `Problem`.
"""

import contextlib
import gzip
import json
import math
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from perl.data.records import Problem, Turn
from perl.errors import UserError

Row = Mapping[str, object]

MAX_LINE_BYTES = 10_000_000
"""Longer lines are a `Problem`: probably another kind of file, or one without newlines."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def parsed(where: str, parse: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | Problem:
    """Return the result of `parse`, or the problem of the row at this place."""
    try:
        return parse(*args, **kwargs)
    except RowError as error:
        return Problem(where, str(error))
    except RecursionError:
        return Problem(where, "nested too deeply")


def sifted(rows: Iterable[_T | Problem]) -> tuple[list[_T], list[Problem]]:
    """Return the usable rows and the problems of the others."""
    both = list(rows)
    usable = [row for row in both if not isinstance(row, Problem)]
    return usable, [row for row in both if isinstance(row, Problem)]


def no_usable_row(problems: Sequence[Problem], where: str, remedy: str) -> UserError:
    """Return the error for a file or folder without any usable row."""
    first = f"; the first: {problems[0].where}: {problems[0].what}" if problems else ": it is empty"
    return UserError(f"no usable row{first}", where=where, remedy=remedy)


# Lines of a file.


@contextlib.contextmanager
def opened(path: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    """Open a file for reading bytes, decompressed if its name ends in .gz.

    Raises:
        UserError: the file is not a complete gzip file although its name ends in .gz.
        OSError: it cannot be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "Get the file again, or remove .gz from its name if it is not compressed."
        raise UserError(f"is not a complete gzip file: {error}", where=str(path), remedy=remedy) from None


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, numbered from 1; only the beginning of a line that is too long.

    Raises:
        UserError: the file is not a complete gzip file although its name ends in .gz.
        OSError: it cannot be read.
    """
    with opened(path) as file:
        for number in count(1):
            line = rest = file.readline(MAX_LINE_BYTES + 1)
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def line_value(line: bytes) -> object:
    """Return the JSON value of a line.

    Raises:
        RowError: the line is too long, not UTF-8 or JSON, has a field twice, or is nested too deeply.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RowError(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}") from None
    if "\0" in text:
        raise RowError("the line contains NUL bytes")
    return strict_json(text, object_pairs_hook=_without_repeats)


def strict_json(text: str, **options: Any) -> object:
    """Parse JSON; NaN and infinities are refused, and so is 1e999, which would be one.

    Args:
        options: options of `json.loads`, such as `strict=False`, which allows raw tabs and newlines in strings.

    Raises:
        RowError: not JSON, or nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise RowError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if math.isinf(float(number)):
            raise RowError(f"{number} is too large a number")
        return float(number)

    try:
        value: object = json.loads(text, parse_constant=refuse, parse_float=finite, **options)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> Row:
    """Return the object; refuse repeated fields, of which `json.loads` would keep the last."""
    row: dict[str, object] = {}
    for name, value in pairs:
        if name in row:
            raise RowError(f"the field {shown(name)} occurs twice")
        row[name] = value
    return row


# Fields of a row. Each function raises `RowError` if the value is not what is expected.


def object_with(value: object, fields: Iterable[str] = (), name: str = "the row") -> Row:
    """Return the value if it is an object with these fields."""
    if not isinstance(value, dict):
        raise RowError(f"{name} is {kind(value)}; an object expected")
    if missing := [field for field in fields if field not in value]:
        raise RowError(f"{name} has no {', '.join(missing)}")
    return value


def has_prompt_twice(row: Row) -> bool:
    """Return whether a comparison's messages repeat its prompt, given as text, as in UltraFeedback."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if not isinstance(prompt, str) or not isinstance(chosen, list):
        return False
    return any(
        isinstance(one, dict) and one.get("role") == "user" and one.get("content") == prompt for one in chosen
    )


def list_of(value: object, name: str) -> list[object]:
    """Return the value if it is a list."""
    if not isinstance(value, list):
        raise RowError(f"{name} is {kind(value)}; a list expected")
    return value


def usable_text(value: object, name: str) -> str:
    """Return the value if it is text that every tokenizer accepts: without NUL and unpaired surrogates."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind(value)}; text expected")
    if "\0" in value:
        raise RowError(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} contains an unpaired surrogate at character {error.start}") from None
    return value


def content_text(value: object, name: str) -> str:
    """Return a message's content as one text: it is text, or a list of text parts as in OpenAI's API."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(usable_text(part.get("text"), f"a part of {name}") for part in value)
    return usable_text(value, name)


def binary_label(value: object, name: str) -> bool:
    """Return a binary label: true or 1 is up, false or 0 is down."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowError(f"{name} is {shown(value)}; true or false (or 1, 0) expected")


UP = ("true", "yes", "y", "up", "thumbs up", "thumb up", "good", "positive", "like", "liked", "👍")
DOWN = ("false", "no", "n", "down", "thumbs down", "thumb down", "bad", "negative", "dislike", "disliked", "👎")
"""Words for a thumb up and a thumb down, case, hyphens and underscores ignored."""
_EMOJI_FORM = re.compile("[\ufe0f\U0001f3fb-\U0001f3ff]")
"""What follows an emoji to choose its form or its skin colour."""


def label_value(value: object) -> object:
    """Convert a label that is text to a number, or to a boolean for a word in `UP` or `DOWN`, if possible."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):
        return float(value)
    word = " ".join(re.split(r"[\s_-]+", _EMOJI_FORM.sub("", value).strip().casefold()))
    return word in UP if word in (*UP, *DOWN) else value


STARS = "convert one to five stars to (stars - 1) / 4"
"""Advice for a label above 1."""
MOST_STARS = 0.1
"""Maximum share of rows with a label above 1; with more, the other labels are on another scale too."""
FEW_STARS = 3
"""Number of such rows that is always accepted."""


def soft_label(value: object, name: str) -> float:
    """Return a label as `binary_label` does, or a number from 0 to 1, the probability of up; text is converted."""
    label = label_value(value)
    if isinstance(label, bool | int | float) and 0 <= label <= 1:
        return float(label)
    if isinstance(label, int | float) and label == -1:  # a thumb down where 1 is up
        return 0.0
    stars = f"; {STARS}" if isinstance(label, int | float) and 1 < label < math.inf else ""
    raise RowError(f"{name} is {shown(value)}; true or false (or 1, 0), or a number between, expected{stars}")


def refuse_stars(usable: int, problems: Sequence[Problem]) -> None:
    """Refuse a file whose labels are on a scale on which 1 is the lowest, because 1 would count as a thumb up.

    Args:
        usable: the number of rows that could be used.
    """
    stars = [one for one in problems if one.what.endswith(STARS)]
    if usable and len(stars) > max(FEW_STARS, MOST_STARS * (len(stars) + usable)):
        what = "its labels are on a scale, such as stars, on which a 1 would count as a thumb up"
        raise UserError(what, where=stars[0].where, remedy=f"{STARS.capitalize()}, or to true and false.")


def number_to(most: float, value: object, name: str) -> float:
    """Return the value if it is a number from 0 to `most`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
        return float(value)
    raise RowError(f"{name} is {shown(value)}; a number from 0 to {most:,.0f} expected")


def first_user_key(turns: Iterable[Turn], domain: str = "") -> str:
    """Return a dialogue's key if the data have none: its first user turn, ignoring case and spaces.

    All contexts of a dialogue are prefixes of one another and share this turn, so splitting by it does not leak.
    """
    first = next((turn.text for turn in turns if turn.speaker in ("user", "text")), "")
    key = " ".join(first.casefold().split())
    return f"{domain}:{key}" if domain else key


def kind(value: object) -> str:
    """Return the JSON type of a value in words."""
    if value is None:
        return "null"
    types = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return types.get(type(value), "an object")


shown = reprlib.repr
"""Formats a value for a message, shortened to a readable length."""
