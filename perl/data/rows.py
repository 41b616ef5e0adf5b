"""What all readers of rows share: strict JSON, usable text, numbers, and the key of a dialogue."""

import json
import reprlib
from collections.abc import Iterable
from typing import Any

from perl.data.records import Turn


class RowError(ValueError):
    """A row that cannot be used; the message says why. Never leaves the readers: it becomes a `Problem`."""


def strict_json(text: str, *, control_characters: bool = False) -> Any:
    """Parses JSON; NaN and infinities are refused.

    Args:
        text: a JSON document.
        control_characters: allow raw tabs and newlines inside strings.

    Raises:
        RowError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, strict=not control_characters)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from None
    except RecursionError:
        raise RowError("nested too deeply") from None


def _refuse_constant(constant: str) -> None:
    raise RowError(f"{constant} is not JSON")


def usable_text(value: object, name: str) -> str:
    """The value if it is text that every tokenizer takes.

    Raises:
        RowError: not a string, a NUL character, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind(value)}; text expected")
    if "\0" in value:
        raise RowError(f"{name} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half a surrogate pair at character {error.start}") from None
    return value


def label_of(value: object, name: str) -> bool:
    """A thumb: true or 1 is up, false or 0 is down.

    Raises:
        RowError: anything else.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowError(f"{name} is {shown(value)}; true or false (or 1, 0) expected")


def chance_of(value: object, name: str) -> float:
    """A thumb that may be uncertain: as `label_of`, or a number between, which is how probable a thumb up is.

    Raises:
        RowError: anything else.
    """
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise RowError(f"{name} is {shown(value)}; true or false (or 1, 0), or a number between, expected")


def number_of(value: object, name: str, most: float) -> float:
    """A number from 0 to `most`.

    Raises:
        RowError: anything else.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
        return float(value)
    raise RowError(f"{name} is {shown(value)}; a number from 0 to {most:,.0f} expected")


def first_user_key(turns: Iterable[Turn], domain: str = "") -> str:
    """What tells dialogues apart where nothing else does: the first user turn, case and spaces aside.

    Contexts of one dialogue are prefixes of one another and share it, so a split by it does not leak.
    """
    first = next((turn.text for turn in turns if turn.speaker in ("user", "text")), "")
    key = " ".join(first.casefold().split())
    return f"{domain}:{key}" if domain else key


def kind(value: object) -> str:
    """The JSON type of a value, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"


def shown(value: object) -> str:
    """A value for a message, cut to a readable length."""
    return reprlib.repr(value)
