"""Drafting a recipe from a data file: the stages that its rows allow, and a comment for each key."""

import re
import textwrap
from collections.abc import Iterator, Mapping

import yaml

from perl.data.records import Records
from perl.recipe.keys import recipe_keys

Content = dict[str, object]
WIDTH = 110
LONG_PROMPT = 1_000
"""Length in characters above which prompts are cut: one that leaves no room for a completion would be refused."""


def draft(
    name: str, base: str, dtype: str, data: str, columns: Mapping[str, str], records: Records, chat: bool
) -> Content:
    """Return the content of a recipe.

    Args:
        name: of the recipe's file.
        dtype: the base's dtype.
        data: the path of the file of rows.
        columns: the column names in it, by field name of TRL's formats.
        chat: whether plain text is turned into chats.
    """
    content: Content = {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-_")[:100] or "mine", "seed": 0}
    content["base"] = {"model": base, "dtype": dtype}
    content["lora"] = {"rank": 16, "alpha": 32}
    named: Content = {"columns": dict(columns)} if columns else {}
    content["data"] = {"path": data, **named, **({"chat": True} if chat else {}), "held_out": 0.2}
    if records.demonstrations:
        content["sft"] = {"epochs": 1, "batch_size": 16}
    rated = _rated(records)
    if rated is not None:
        content["reward"] = {"loss": rated, "epochs": 2, "batch_size": 16}
    if rated is not None or not records.demonstrations:
        content["rl"] = _rl(records, rated is not None)
    return content


def _rated(records: Records) -> str | None:
    if records.ratings:
        return "both" if records.comparisons else "thumbs"
    return "pairs" if records.comparisons else None


def _rl(records: Records, model: bool) -> Content:
    """Return the section `rl`. For prompts without ratings the reward is a placeholder for the user's own."""
    longest = max((sum(len(turn.text) for turn in one.context) for one in records.prompts), default=0)
    cut: Content = {"max_prompt_length": 512} if longest > LONG_PROMPT else {}
    reward: Content = {} if model else {"reward": {"kind": "length", "target": 20}}
    return {**reward, "steps": 100, "prompts_per_step": 16, **cut, "max_new_tokens": 64}


def commented(content: Content) -> str:
    """Return a recipe's content as YAML, with the first sentence of each key's meaning as a comment before it."""
    meanings = {key.name: key.meaning for key in recipe_keys()}
    meanings["rl.reward"] = (
        "A placeholder for your reward: `{function: FILE.py:NAME}` or a rule such as `{kind: regex, pattern: …}`."
    )
    return "\n".join(["# perl-rlhf keys has all other keys.", *_lines(content, meanings, "")]) + "\n"


def _lines(content: Mapping[str, object], meanings: Mapping[str, str], section: str) -> Iterator[str]:
    indent = "  " * section.count(".")
    for key, value in content.items():
        name = f"{section}{key}"
        meaning, _, _ = meanings.get(name, "").partition(". ")
        mark = f"{indent}# "
        yield from textwrap.wrap(meaning.rstrip("."), WIDTH, initial_indent=mark, subsequent_indent=mark)
        if isinstance(value, dict) and any(one.startswith(f"{name}.") for one in meanings):
            yield f"{indent}{key}:"
            yield from _lines(value, meanings, f"{name}.")
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _flow(value: object) -> str:
    """Return a value as YAML on one line, without the document end that PyYAML writes after a scalar."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
