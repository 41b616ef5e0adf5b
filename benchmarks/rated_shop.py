"""The coffee shop with few ratings of its own, and those in a file: a plugin of `benchmarks.rating_loop`."""

from pathlib import Path

from perl.data.jsonl import read_jsonl
from perl.data.records import Records
from perl.data.sources import SOURCES, Source

FIRST = 100
"""Ratings of the shop's own, so that the first round has a reward model."""


def read_rated(path: Path | None, seed: int) -> Records:
    """The shop's records, of whose ratings only the first are kept; the file's are added.

    Every fifth dialogue of the shop's is held out, whatever the file adds: the split, and with it SFT, stays.
    """
    records = SOURCES["coffee-simulator"].read(None, seed)
    records.ratings = records.ratings[:FIRST]
    dialogues = dict.fromkeys(row.dialogue for row in records.rows())
    records.published_test = frozenset(list(dialogues)[::5])
    if path is not None and path.stat().st_size:
        records.ratings += read_jsonl(path).ratings
    return records


SOURCES["rated-shop"] = Source(read_rated, "the coffee shop with ratings of a file")
