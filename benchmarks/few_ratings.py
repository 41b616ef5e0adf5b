"""The coffee shop with 5,000 ratings, so that judging costs less than training: a plugin of `benchmarks.kinds`."""

from pathlib import Path

from perl.data.records import Records
from perl.data.simulator.source import simulate
from perl.data.sources import SOURCES, Source


def read_few(path: Path | None, seed: int) -> Records:
    """The shop's records of a seed; it has no file."""
    return simulate(seed, ratings=5_000)


SOURCES["few-ratings"] = Source(read_few, "the coffee shop with 5,000 ratings")
