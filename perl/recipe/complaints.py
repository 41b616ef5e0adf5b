"""Pydantic's errors about a recipe as messages with key, value and remedy."""

import difflib
import re
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from perl.errors import UserError
from perl.recipe.recipe import Recipe
from perl.recipe.section import Section


class _Place(NamedTuple):
    """The place of an error of pydantic."""

    keys: list[str]
    """The keys that lead there."""
    section: type[Section]
    """The innermost section on the path."""
    field: FieldInfo | None
    """The last key, if that section has it."""


def explain(error: ValidationError, content: dict[str, Any], recipe: str) -> UserError:
    """Return pydantic's first error in the recipe's terms, with the nearest valid key.

    Args:
        content: what was validated.
        recipe: what to call it: its file.
    """
    first = error.errors(include_url=False)[0]
    place = _place(first["loc"], content)
    key = ".".join(place.keys)
    where = f"{recipe}: {key}" if key else recipe
    if first["type"] == "extra_forbidden":
        valid = [field.alias or name for name, field in place.section.model_fields.items()]
        near = difflib.get_close_matches(place.keys[-1], valid, n=1, cutoff=0.5)
        meant = ".".join([*place.keys[:-1], *near])
        return UserError(
            "unknown key",
            where=where,
            remedy=f"Did you mean {meant}?" if near else f"Valid keys: {', '.join(valid)}.",
        )
    if first["type"] == "missing":
        return UserError(
            "missing", where=where, remedy="Add this key; recipes/quickstart.yaml shows a complete recipe."
        )
    message = first["msg"].removeprefix("Value error, ")
    what = f"{message[:1].lower()}{message[1:]}"
    if first["type"] == "model_type":
        what = "a section with keys and values is expected here"
    if first["type"] == "value_error":  # from a validator of ours: what is wrong, and usually what to do
        what, _, remedy = what.partition(": ")
        end = "" if remedy.endswith("?") else "."
        return UserError(
            what, where=where, remedy=f"{remedy[0].upper()}{remedy[1:]}{end}" if remedy else _remedy(first, place)
        )
    return UserError(
        f"{what} (the value is {reprlib.repr(first['input'])})", where=where, remedy=_remedy(first, place)
    )


def _remedy(complaint: Any, place: _Place) -> str:
    """Return what to write instead of an invalid value: the word that was probably meant, or the key's default."""
    if complaint["type"] == "literal_error":
        valid = re.findall(r"'([^']*)'", complaint["ctx"]["expected"])
        near = difflib.get_close_matches(str(complaint["input"]), valid, n=1, cutoff=0.7)
        if near:
            return f"Did you mean {near[0]}?"
    field = place.field
    if field is None or field.is_required() or field.default in (None, "") or isinstance(field.default, Section):
        return "recipes/quickstart.yaml shows a complete recipe."
    return f"The default is {field.default}."


def _place(location: Sequence[int | str], content: dict[str, Any]) -> _Place:
    """Follow the location of an error through the content."""
    keys: list[str] = []
    section: type[Section] = Recipe
    field: FieldInfo | None = None
    value: Any = content
    for step in location:
        if step in section.model_fields or (isinstance(value, dict) and step in value):
            field = section.model_fields.get(str(step))
            value = value.get(step) if isinstance(value, dict) else None
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:  # pydantic's name for the member of a union
            continue
        keys.append(str(step))
        inner = _sections(field.annotation) if field is not None else []
        section = inner[0].variant(value) if inner else section
    return _Place(keys, section, field)


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections that a key may hold, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for option in get_args(annotation) for section in _sections(option)]
