"""What pydantic says of a recipe, in the words of a recipe: key, value and remedy."""

import difflib
import re
import reprlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from perl.errors import UserError
from perl.recipe.recipe import Recipe
from perl.recipe.section import Section


def explain(error: ValidationError, path: Path) -> UserError:
    """The first complaint of pydantic in the recipe's own words, with the nearest valid key."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(part for part in location if part.isidentifier() or part.isdigit())
    where = f"{path}: {key}" if key else str(path)
    if first["type"] == "extra_forbidden":
        valid = list(_on_the_way(location)[0].model_fields)
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        remedy = (
            f"Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"Valid keys: {', '.join(valid)}."
        )
        return UserError("unknown key", where=where, remedy=remedy)
    if first["type"] == "missing":
        return UserError(
            "missing", where=where, remedy="Add this key; recipes/quickstart.yaml shows a complete recipe."
        )
    message = first["msg"].removeprefix("Value error, ")
    what = f"{message[0].lower()}{message[1:]}"
    if first["type"] == "value_error":  # of several keys together, by a validator above: what is wrong, what to do
        what, _, remedy = what.partition(": ")
        return UserError(
            what, where=where, remedy=f"{remedy[0].upper()}{remedy[1:]}{'' if remedy[-1] == '?' else '.'}"
        )
    return UserError(
        f"{what} (the value is {reprlib.repr(first['input'])})", where=where, remedy=_remedy(first, location)
    )


def _remedy(complaint: Any, location: list[str]) -> str:
    """What to write in place of an impossible value: the word that was meant, or what the key is by default."""
    if complaint["type"] == "literal_error":
        valid = re.findall(r"'([^']*)'", complaint["ctx"]["expected"])
        near = difflib.get_close_matches(str(complaint["input"]), valid, n=1, cutoff=0.7)
        if near:
            return f"Did you mean {near[0]}?"
    _, field = _on_the_way(location)
    if field is None or field.is_required() or field.default is None or isinstance(field.default, Section):
        return "recipes/quickstart.yaml shows a complete recipe."
    return f"The default is {field.default}."


def _on_the_way(location: list[str]) -> tuple[type[Section], FieldInfo | None]:
    """The innermost section and the last key that pydantic's location of a complaint leads through."""
    section: type[Section] = Recipe
    field: FieldInfo | None = None
    for part in location:
        if part not in section.model_fields:
            break
        field = section.model_fields[part]
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [option for option in options if isinstance(option, type) and issubclass(option, Section)]
        if not inner:
            break
        section = inner[0]
    return section, field
