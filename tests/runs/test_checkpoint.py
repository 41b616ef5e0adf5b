"""Checkpoints on disk: complete or absent, only the newest few, with an error when damaged."""

import errno
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from perl.errors import UserError
from perl.runs import snapshot
from perl.runs.checkpoint import Checkpoints, State


def state(step: int, size: int = 3) -> State:
    return State(step, {"policy.weight": torch.full((size,), float(step))}, {"seconds": 0.1 * step})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 20)
    assert checkpoints.newest() is None
    assert [step for step in range(1, 50) if checkpoints.due(step)] == [20, 40]
    checkpoints.write(state(20))
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 20
    assert found.values == {"seconds": 2.0}
    assert torch.equal(found.tensors["policy.weight"], torch.full((3,), 20.0))


def test_the_newest_stay_and_those_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    for step in (1, 2, 3, 100):
        checkpoints.write(state(step), keep=[1])
    assert checkpoints.steps() == [1, 3, 100]


def test_what_an_interrupted_write_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000040.unfinished").mkdir()
    (tmp_path / ".step-00000040.unfinished" / "state.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path, 20)
    assert checkpoints.steps() == []
    assert not any(tmp_path.iterdir())


def test_a_users_copy_of_a_checkpoint_is_ignored(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 20)
    checkpoints.write(state(20))
    for name in ("step-00000020 (copy)", "step-00000020.bak", "step-best"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == [20]


def cut(folder: Path) -> None:
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def other(folder: Path) -> None:
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def no_tensors(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


def no_values(folder: Path) -> None:
    (folder / "state.json").unlink()


def half_values(folder: Path) -> None:
    file = folder / "state.json"
    file.write_text(file.read_text()[:40])


def no_key(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"step": 40}))


@pytest.mark.parametrize("damage", [cut, other, no_tensors, no_values, half_values, no_key])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, 20)
    checkpoints.write(state(20))
    checkpoints.write(state(40))
    damage(tmp_path / "step-00000040")
    with pytest.raises(UserError, match="this checkpoint is damaged") as caught:
        checkpoints.newest()
    assert "step-00000040" in str(caught.value)
    assert "resumes from step 20" in str(caught.value)


def test_without_room_the_checkpoints_before_are_as_they_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 20)
    checkpoints.write(state(20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="large") as caught:
            checkpoints.write(state(40, size=10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EIO, errno.EFBIG)
    assert checkpoints.steps() == [20]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]
    checkpoints.write(state(40, size=10_000))
    assert checkpoints.steps() == [20, 40]


def test_a_checkpoint_of_another_base_or_reward_model_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 20, {"base": "a", "reward role": "b"}).write(state(20))
    found = Checkpoints(tmp_path, 20, {"base": "a", "reward role": "b"}).newest()
    assert found is not None
    with pytest.raises(UserError, match="belongs to another base, another reward role"):
        Checkpoints(tmp_path, 20, {"base": "x", "reward role": "y"}).newest()


def test_all_generators_are_put_back() -> None:
    random.gauss()  # keeps one for the next call
    np.random.standard_normal()
    tensors, states = snapshot.generators()
    kept = json.loads(json.dumps(states))

    def draw() -> tuple[float, float, float, float]:
        return random.gauss(), random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    before = draw()
    draw()
    snapshot.set_generators(State(0, tensors, {"generators": kept}))
    assert draw() == before
