"""Plugin of `benchmarks.kinds`: the coffee shop with 5,000 ratings, to make evaluation cheap."""

from pathlib import Path

from perl.data.records import Records
from perl.data.simulator.source import simulate
from perl.data.sources import SOURCES, Source


def read_few(path: Path | None, seed: int) -> Records:
    """Return the shop's records for a seed; there is no file."""
    return simulate(seed, ratings=5_000)


SOURCES["few-ratings"] = Source(read_few, "the coffee shop with 5,000 ratings")
