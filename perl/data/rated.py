"""Rows that `perl-rlhf rate` has written: an append-only log, of which the last row with an id is in force.

{"prompt": …, "completion": …, "label": true, "rated": {"id": "5f…", "rater": "ann", …}}
{"rated": {"id": "5f…", "rater": "ann", "undone": true, …}}        takes the row with this id back
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
RATED = "rated"
"""The field that says what is known of a rating."""


@dataclass(frozen=True, slots=True)
class Rated:
    """What decides which rows are in force."""

    id: str
    undone: bool


def rated_of(row: object) -> Rated | None:
    """Of a row that `rate` has written; None for other rows, whose field `rated`, if any, is a column."""
    field = row.get(RATED) if isinstance(row, dict) else None
    if not isinstance(field, dict) or not isinstance(field.get("id"), str):
        return None
    return Rated(field["id"], field.get("undone") is True)


def in_force(rows: Iterable[tuple[str | None, T]]) -> list[T]:
    """The rows, each with its id if it has one, less those that a later row of the same id replaces."""
    rows = list(rows)
    last = {key: place for place, (key, _) in enumerate(rows)}
    return [row for place, (key, row) in enumerate(rows) if key is None or last[key] == place]
