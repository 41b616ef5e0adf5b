"""The coffee shop with few ratings of its own, and those in a file: a plugin of `benchmarks.rating_loop`."""

from pathlib import Path

from perl.data.jsonl import read_jsonl
from perl.data.records import Records
from perl.data.sources import SOURCES, Source

FIRST = 100
"""Ratings of the shop's own, so that the first round has a reward model."""


def read_rated(path: Path | None, seed: int) -> Records:
    """The shop's records, of whose ratings only the first are kept; the file's are added."""
    records = SOURCES["coffee-simulator"].read(None, seed)
    added = read_jsonl(path).ratings if path is not None and path.stat().st_size else []
    records.ratings = records.ratings[:FIRST] + added
    return records


SOURCES["rated-shop"] = Source(read_rated, "the coffee shop with ratings of a file")
