"""Frozen dataclasses as JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from perl.errors import UserError

T = TypeVar("T")
_ADAPTERS: dict[object, TypeAdapter[Any]] = {}
"""They take milliseconds to build; a file of samples needs one for every line."""


def as_json(value: Any) -> Any:
    """A result as JSON: dataclasses become objects, whose optional fields without a value are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = [(field, getattr(value, field.name)) for field in fields(value)]
        return {field.name: as_json(one) for field, one in pairs if one is not None or field.default is MISSING}
    if isinstance(value, Mapping):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return value


def made(kind: type[T], values: Mapping[str, Any]) -> T:
    """A result from what its producer has.

    Raises:
        ValidationError: a field is missing or of another type, or a key is no field: a mistake in the producer.
    """
    result: T = _adapter(kind).validate_python(values, extra="forbid")
    return result


def parse(kind: type[T], text: str, where: str, remedy: str) -> T:
    """A result from a file's text.

    Raises:
        UserError: not JSON, or a field is missing or of another type; the field is named.
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


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
