"""Plugin of `benchmarks.rating_loop`: the coffee shop with few ratings of its own and those in a file."""

from pathlib import Path

from perl.data.jsonl import read_jsonl
from perl.data.records import Records
from perl.data.sources import SOURCES, Source

FIRST = 100
"""Number of the shop's own ratings, which train the first reward model."""


def read_rated(path: Path | None, seed: int) -> Records:
    """Return the shop's records with only its first ratings and those in the file.

    Every fifth of the shop's dialogues is held out whatever the file adds, so the split and SFT do not change.
    """
    records = SOURCES["coffee-simulator"].read(None, seed)
    records.ratings = records.ratings[:FIRST]
    dialogues = dict.fromkeys(row.dialogue for row in records.rows())
    records.published_test = frozenset(list(dialogues)[::5])
    if path is not None and path.stat().st_size:
        records.ratings += read_jsonl(path).ratings
    return records


SOURCES["rated-shop"] = Source(read_rated, "the coffee shop with ratings of a file")
