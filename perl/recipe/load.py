"""Reading a recipe: its file, the overrides of the command line, its paths; and what is wrong with it in words."""

import os
import reprlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from perl.errors import UserError
from perl.recipe.adapter import section_meant
from perl.recipe.base import ORIGINS
from perl.recipe.complaints import explain
from perl.recipe.recipe import STAGES, Recipe
from perl.system import plain_yaml


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, apply `KEY=VALUE` overrides, resolve its paths and check it.

    A relative path is looked up beside the recipe first, then in the working folder.

    Raises:
        UserError: unreadable file, broken YAML, unknown key, impossible value.
    """
    path = Path(path)
    content = plain_yaml.read_mapping(path)
    for override in overrides or []:
        _apply_override(content, override)
    _replace_origin(content, overrides or [])
    _resolve_paths(content, path.parent)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise explain(error, path) from None


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not KEY=VALUE", remedy="For example rl.algorithm=ppo.")
    try:
        value = plain_yaml.parse(text)
    except ValueError as error:
        what = f"value {reprlib.repr(text)} is not valid YAML: {error}"
        raise UserError(what, where=key, remedy="Quote it as YAML would.") from None
    first, *rest = key.split(".")
    *parents, last = [section_meant([first, *rest], content), *rest]
    if parents and parents[0] in STAGES and content.get(parents[0]) is None:
        remedy = f"Add `{parents[0]}: {{}}` to the recipe first."
        raise UserError(f"the recipe has no section {parents[0]}", where=override, remedy=remedy)
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"{parent} is a value, not a section", where=override, remedy="Check the key.")
    content[last] = value


def _replace_origin(content: dict[str, Any], overrides: list[str]) -> None:
    """Where overrides name an origin of the base, take the recipe's other one out, with what only goes with it."""
    said = [override.partition("=")[0].split(".") for override in overrides]
    keys = {key[1] for key in said if key[0] == "base" and len(key) > 1}
    named, base = keys & ORIGINS.keys(), content.get("base")
    if not named or not isinstance(base, dict):
        return
    for origin in (ORIGINS.keys() - named) & {key for key, value in base.items() if value is not None}:
        for key in (origin, *ORIGINS[origin]):
            if key not in keys:
                base.pop(key, None)


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Make the paths in a recipe absolute where they exist; the loaders name what is missing."""

    def resolve(section: Any, key: str) -> None:
        text = section.get(key) if isinstance(section, dict) else None
        if not isinstance(text, str) or "\0" in text:
            return
        file, colon, name = text.partition(".py:")
        file += ".py" if colon else ""
        try:
            given = Path(os.path.expanduser(file))  # Path's own raises for the home of nobody
            for candidate in (folder / given, given):
                if candidate.exists():
                    section[key] = str(candidate.resolve()) + (f":{name}" if colon else "")
                    return
        except OSError:  # a name too long to be a path
            return

    resolve(content.get("base"), "model")
    resolve(content.get("data"), "path")
    rl = content.get("rl")
    resolve(rl.get("reward") if isinstance(rl, dict) else None, "function")
