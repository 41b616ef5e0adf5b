"""Conversion of frozen dataclasses to JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from perl.errors import UserError
from perl.system.files import text_if_any

T = TypeVar("T")
_ADAPTERS: dict[object, TypeAdapter[Any]] = {}
"""Adapters by type: each takes milliseconds to build, and every line of a file of samples needs one."""


def as_json(value: Any) -> Any:
    """Convert a result to JSON; dataclasses become objects without the optional fields that have no value."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = [(field, getattr(value, field.name)) for field in fields(value)]
        return {field.name: as_json(one) for field, one in pairs if one is not None or field.default is MISSING}
    if isinstance(value, Mapping):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return value


def made(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a result from its fields. A missing, mistyped or unknown field is a bug (`ValidationError`)."""
    result: T = _adapter(kind).validate_python(values, extra="forbid")
    return result


def parse(kind: type[T], text: str, where: str, remedy: str) -> T:
    """Parse a result from a file's text.

    Raises:
        UserError: not JSON, or a field (named in the message) is missing or of another type.
    """
    try:
        result: T = _adapter(kind).validate_python(json.loads(text))
        return result
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{key or 'the value'}: {first['msg']}", where=where, remedy=remedy) from None
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, remedy=remedy) from None


def read(kind: type[T], file: Path, remedy: str) -> T | None:
    """Parse a result's file; None if there is none. Raises `UserError` as `parse` and `text_if_any` do."""
    text = text_if_any(file, remedy)
    return None if text is None else parse(kind, text, str(file), remedy)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
