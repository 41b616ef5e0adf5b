"""Files that are written atomically."""

import os
from pathlib import Path

import pytest

from perl.system.files import write_whole


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "scores.jsonl", tmp_path / "scores.jsonl"
    target.parent.mkdir()
    link.symlink_to("there/scores.jsonl")
    for text in ("new", "newer"):
        write_whole(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_pipe_is_written_into_not_replaced(tmp_path: Path) -> None:
    """So that `--out /dev/stdout` works, and root's `--out /dev/null` does not replace the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reading, 10) == b"text"
    os.close(reading)
    assert pipe.is_fifo()


def test_nothing_is_left_beside_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "out", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
