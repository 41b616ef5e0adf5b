"""Tests of the page draw its plots."""

import pytest


@pytest.fixture(autouse=True)
def _blank_plots() -> None:
    """Draw them."""
