"""Records that several tests share."""

import pytest

from perl.data.records import Records
from perl.data.sources import load_records


@pytest.fixture(scope="session")
def simulated() -> Records:
    """Return all records of the coffee simulator with seed 1; tests must not change them."""
    return load_records("coffee-simulator", None, seed=1)
