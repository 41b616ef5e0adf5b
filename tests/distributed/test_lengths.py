"""Sampling from a base that processes hold together never waits for who has ended."""

import re

import pytest

from tests.distributed.launching import finished, torchrun


@pytest.mark.parametrize(
    ("engine", "steps"),
    [
        ("zero3", 40),
        pytest.param("zero3", 200, marks=pytest.mark.slow),
        pytest.param("fsdp2", 200, marks=pytest.mark.slow),
    ],
)
def test_answers_of_very_different_lengths_never_hang(engine: str, steps: int) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    status, said = finished(torchrun(2, "-m", "tests.distributed.lengths_worker", steps, engine=engine))
    assert status == 0, said
    found = re.search(rf"done {steps} steps; ended before the others: \[(\d+), (\d+)\]", said)
    assert found, said
    assert all(int(count) > steps / 20 for count in found.groups())
