"""Sampling from a base that processes hold together never waits for who has ended."""

import re

import pytest

from tests.distributed.launching import finished, torchrun


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_answers_of_very_different_lengths_never_hang(engine: str) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    status, said = finished(torchrun(2, "-m", "tests.distributed.lengths_worker", engine=engine))
    assert status == 0, said
    found = re.search(r"done 200 steps; ended before the others: \[(\d+), (\d+)\]", said)
    assert found, said
    assert all(int(count) > 10 for count in found.groups())
