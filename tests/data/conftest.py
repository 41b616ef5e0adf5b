"""What is drawn once for several tests."""

import pytest

from perl.data.records import Records
from perl.data.sources import load_records


@pytest.fixture(scope="session")
def simulated() -> Records:
    """All records of the coffee simulator under seed 1, to be read."""
    return load_records("coffee-simulator", None, seed=1)
