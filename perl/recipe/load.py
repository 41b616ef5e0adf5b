"""Reading a recipe: its file, the overrides of the command line, its paths, and messages about mistakes in it."""

import copy
import os
import reprlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from perl.errors import UserError
from perl.plugins import load_plugins
from perl.recipe.adapter import BUILT_IN, LORA, all_settings, section_meant
from perl.recipe.base import ORIGINS
from perl.recipe.complaints import explain
from perl.recipe.recipe import STAGES, Recipe
from perl.system import plain_yaml


def load_recipe(
    source: str | Path | Mapping[str, object], overrides: list[str] | None = None, *, resolved: bool = False
) -> Recipe:
    """Read a recipe, apply `KEY=VALUE` overrides, resolve its paths, import its plugins and check it.

    A relative path is looked up in the recipe's folder first, then in the working directory.

    Args:
        source: a YAML file, or what such a file would contain.
        resolved: whether it is the recipe of a run folder, for which adapters that stages start from were read
            before.

    Raises:
        UserError: unreadable file, broken YAML, a plugin that cannot be imported, unknown key, invalid value, or
            an adapter to start from that is missing or does not match the recipe.
    """
    if isinstance(source, Mapping):
        content, folder, named = copy.deepcopy(dict[str, Any](source)), Path(), "the recipe"
    else:
        path = Path(source)
        content, folder, named = plain_yaml.read_mapping(path), path.parent, str(path)
    for override in overrides or []:
        _apply_override(content, override)
    _replace_origin(content, overrides or [])
    _replace_adapters(content, overrides or [])
    _resolve_paths(content, folder)
    _settings_of_sources(content)
    files = content.get("plugins")
    if isinstance(files, list) and all(isinstance(file, str) for file in files):  # others are refused later
        load_plugins(files, where=f"{named}: plugins")
    if not resolved:
        _settings_of_adapters(content)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise explain(error, content, named) from None


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
    keys = [section_meant([first, *rest], content), *rest]
    if keys[1:] and keys[0] in STAGES and content.get(keys[0]) is None:
        remedy = f"Add `{keys[0]}: {{}}` to the recipe first."
        raise UserError(f"the recipe has no section {keys[0]}", where=override, remedy=remedy)
    inner: Any = content
    for outer, below in pairwise(keys):
        inner = inner[int(outer)] if isinstance(inner, list) else inner.setdefault(outer, {})
        if isinstance(inner, list) and below not in map(str, range(len(inner))):
            raise UserError(f"{outer} has no item {below}", where=override, remedy="Items are counted from 0.")
        if not isinstance(inner, dict | list):
            raise UserError(f"{outer} is a value, not a section", where=override, remedy="Check the key.")
    inner[int(keys[-1]) if isinstance(inner, list) else keys[-1]] = value


def _replace_origin(content: dict[str, Any], overrides: list[str]) -> None:
    """If overrides name an origin of the base, remove the recipe's other one and the keys that only go with it."""
    said = [override.partition("=")[0].split(".") for override in overrides]
    keys = {key[1] for key in said if key[0] == "base" and len(key) > 1}
    named, base = keys & ORIGINS.keys(), content.get("base")
    if not named or not isinstance(base, dict):
        return
    for origin in (ORIGINS.keys() - named) & {key for key, value in base.items() if value is not None}:
        for key in (origin, *ORIGINS[origin]):
            if key not in keys:
                base.pop(key, None)


def _replace_adapters(content: dict[str, Any], overrides: list[str]) -> None:
    """Remove what an override replaces.

    If it is the whole section `lora` or `adapter`, the recipe's other one; if it is `adapter.kind`, the recipe's
    settings that only other kinds have.
    """
    said = {override.partition("=")[0] for override in overrides}
    given = {key for key in (LORA, "adapter") if key in said and content.get(key) is not None}
    if len(given) == 1:
        content.pop("adapter" if given == {LORA} else LORA, None)
    section = content.get("adapter")
    if not isinstance(section, dict) or "adapter.kind" not in said:
        return
    kind = section["kind"]
    if isinstance(kind, str) and kind in BUILT_IN:  # other kinds say themselves what they have
        gone = all_settings() - BUILT_IN[kind].model_fields.keys()
        gone -= {key.partition(".")[2] for key in said}
        content["adapter"] = {key: value for key, value in section.items() if key not in gone}


def _settings_of_sources(content: dict[str, Any]) -> None:
    """Fill unset keys of a section with `from` with the settings of the run that it names."""
    for stage in STAGES:
        section = content.get(stage)
        if not isinstance(section, dict):
            continue
        source = section.get("from")
        if isinstance(source, str) and (file := Path(source) / "recipe.yaml").is_file():
            theirs = plain_yaml.read_mapping(file).get(stage)
            content[stage] = {**(theirs if isinstance(theirs, dict) else {}), **section}


def _settings_of_adapters(content: dict[str, Any]) -> None:
    """Give all adapters the kind and shape of those that stages start from, if there are any.

    Raises:
        UserError: the recipe sets another kind or shape.
    """
    by = "the recipe"
    for stage in STAGES:
        section = content.get(stage)
        folder = section.get("adapter") if isinstance(section, dict) else None
        given = [content[key] for key in (LORA, "adapter") if content.get(key) is not None]
        if not isinstance(folder, str) or len(given) > 1:  # two are refused later
            continue
        from perl.adapters.folder import read_adapter_folder  # imports torch: only where there is one

        found = read_adapter_folder(Path(folder), f"{stage}.adapter")
        said = given[0] if given else {"kind": found.kind}
        if isinstance(said, dict):
            found.refuse_conflicts(str(said.get("kind", LORA)), said, by)
            content.pop(LORA, None)
            content["adapter"] = {"kind": found.kind, **found.settings, **said}
            by = f"the recipe, or {found.where},"


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Make the paths in a recipe absolute if they exist; the loaders report missing ones."""
    rl = content.get("rl")
    rewards = [rl.get(key) for key in ("reward", "eval_reward")] if isinstance(rl, dict) else []
    places = [(content.get("base"), "model"), (content.get("data"), "path"), (content.get("data"), "eval_path")]
    places += [(content.get(stage), key) for stage in STAGES for key in ("from", "adapter")]
    parts = [part for one in rewards for part in (one if isinstance(one, list) else [one])]
    places += [(part, key) for part in parts for key in ("function", "run")]
    for section, key in places:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = _resolved(section[key], folder)
    if isinstance(files := content.get("plugins"), list):
        content["plugins"] = [_resolved(file, folder) if isinstance(file, str) else file for file in files]


def _resolved(text: str, folder: Path) -> str:
    """Return a path, or FILE.py:NAME, made absolute if it exists."""
    if "\0" in text:
        return text
    file, colon, name = text.partition(".py:")
    file += ".py" if colon else ""
    try:
        given = Path(os.path.expanduser(file))  # Path's own raises for an unknown user's home
        for candidate in (folder / given, given):
            if candidate.exists():
                # A file's own name is kept, even if it is a link: its suffix says how to read it.
                whole = candidate.resolve() if candidate.is_dir() else candidate.parent.resolve() / candidate.name
                return str(whole) + (f":{name}" if colon else "")
    except OSError:  # a name too long to be a path
        pass
    return text
