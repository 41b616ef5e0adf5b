"""Every key of a recipe with its values, default and meaning, from the definitions of the sections."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from perl.recipe.adapter import BUILT_IN
from perl.recipe.recipe import Recipe
from perl.recipe.reward_parts import REWARDS
from perl.recipe.section import Section

Schema = Mapping[str, Any]
"""JSON Schema, as pydantic writes it."""
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: with its sections, as in `rl.kl_coef`.
        default: as in YAML; empty if there is none.
    """

    name: str
    values: str
    default: str
    meaning: str


def recipe_keys() -> Iterator[Key]:
    """Yield all keys in the order of a recipe, at the end those of the kinds of `adapter` and of `rl.reward`."""
    yield from _keys_of(Recipe, "")
    for kind, adapter in BUILT_IN.items():
        yield from _keys_of(adapter, f"adapter[{kind}].")
    for kind, settings in REWARDS.items():
        yield from _keys_of(settings, f"rl.reward[{kind}].")


def _keys_of(section: type[Section], prefix: str) -> Iterator[Key]:
    schema = section.model_json_schema()
    yield from _walk(schema, schema.get("$defs", {}), prefix)


def _walk(schema: Schema, definitions: Mapping[str, Schema], prefix: str) -> Iterator[Key]:
    for name, key in schema["properties"].items():
        inner = [option["$ref"] for option in (key, *key.get("anyOf", ())) if "$ref" in option]
        section = definitions[inner[0].rpartition("/")[2]] if inner else {}
        meaning = key.get("description") or section.get("description", "")
        if "properties" in section:
            yield Key(prefix + name, "section", "", _first_sentence(meaning))
            yield from _walk(section, definitions, f"{prefix}{name}.")
        else:
            yield Key(prefix + name, _values(key), _default(key), " ".join(meaning.split()))


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _values(key: Schema) -> str:
    if options := key.get("anyOf"):
        return " or ".join(_values(option) for option in options if option.get("type") != "null")
    if named := key.get("enum") or ([key["const"]] if "const" in key else []):
        return ", ".join(map(str, named))
    if key.get("type") == "array":
        return f"list of {_values(key['items'])}"
    words = TYPES.get(key.get("type", ""), "see below" if "properties" in key else "any")
    return " ".join([words, *(f"{sign} {_number(key[bound])}" for bound, sign in BOUNDS.items() if bound in key)])


def _number(bound: float) -> str:
    return "2³²" if bound == 2**32 else f"{bound:g}"


def _default(key: Schema) -> str:
    value = key.get("default")
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
