"""Rows that `perl-rlhf rate` has written: an append-only log in which the last row with an id is in force.

{"prompt": …, "completion": …, "label": true, "rated": {"id": "5f…", "rater": "ann", …}}
{"rated": {"id": "5f…", "rater": "ann", "undone": true, …}}        undoes the row with this id
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
RATED = "rated"
"""The field with a rating's metadata."""


@dataclass(frozen=True, slots=True)
class Rated:
    """The metadata that decide which rows are in force."""

    id: str
    undone: bool


def rated_of(row: object) -> Rated | None:
    """Return the metadata of a row that `rate` has written; None for other rows, in which `rated` is a column."""
    field = row.get(RATED) if isinstance(row, dict) else None
    if not isinstance(field, dict) or not isinstance(field.get("id"), str):
        return None
    return Rated(field["id"], field.get("undone") is True)


def in_force(rows: Iterable[tuple[str | None, T]]) -> list[T]:
    """Return the rows without those that a later row with the same id replaces.

    Args:
        rows: each row with its id, or None.
    """
    rows = list(rows)
    last = {key: place for place, (key, _) in enumerate(rows)}
    return [row for place, (key, row) in enumerate(rows) if key is None or last[key] == place]
