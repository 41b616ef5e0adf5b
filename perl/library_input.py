"""What callers of the library give: lists of prompts and completions, as records."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perl.data.jsonl import parse_row
from perl.data.records import Record
from perl.data.rows import RowError
from perl.errors import UserError

Messages = Sequence[Mapping[str, str]]
"""Chat messages, each with `role` and `content`, as in TRL and chat templates."""


def lists(**given: Iterable[Any]) -> list[list[Any]]:
    """Return arguments as lists of equal length.

    Raises:
        UserError: one is a single text, whose characters would be taken for texts, or their lengths differ.
    """
    for name, value in given.items():
        if isinstance(value, str):
            raise UserError("is a text; a list expected", where=name, remedy=f"Put it into a list: {name}=[...].")
    found = {name: list(value) for name, value in given.items()}
    if len({len(value) for value in found.values()}) > 1:
        what = ", ".join(f"{len(value)} {name}" for name, value in found.items())
        raise UserError(f"{what}: as many are expected of each", remedy="Give one completion of each prompt.")
    return list(found.values())


def record(where: str, prompt: object, **fields: object) -> Record:
    """Parse a prompt and the other fields of a row of TRL's formats. Raises `UserError` if it fits none."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        prompt = [dict(one) if isinstance(one, Mapping) else one for one in prompt]
    try:
        return parse_row({"prompt": prompt, **fields})[0]
    except RowError as error:
        raise UserError(str(error), where=where, remedy="Give a text, or a list of messages.") from None
