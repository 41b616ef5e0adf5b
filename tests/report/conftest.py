"""Draws real plots in the tests of the page."""

from collections.abc import Iterator

import pytest

from tests.blank import drawn


@pytest.fixture(scope="module", autouse=True)
def _drawn() -> Iterator[None]:
    with drawn():
        yield
