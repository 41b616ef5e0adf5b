"""The registry: every source by its name, and names and paths that are wrong."""

import json
from pathlib import Path

import pytest

from perl.data.fetch import pins
from perl.data.simulator.source import simulate
from perl.data.sources import SOURCES, load_records, load_rows, parse_source
from perl.errors import UserError


def rows_of(folder: Path) -> Path:
    """A release of ticketing with one rated turn, twice."""
    context = json.dumps([{"role": "user", "text": "a"}])
    row = {"context": context, "generation": json.dumps({"role": "agent", "text": "b"}), "reward": 1.0}
    for pin in pins("taskmaster-ticketing"):
        path = folder / pin.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    (folder / "TM-3-2020" / "reward" / "reward_00.json").write_text(json.dumps([row, row]))
    return folder


def test_the_simulator_is_drawn_from_the_seed() -> None:
    records = load_records("coffee-simulator", None, seed=1)
    assert [len(records.demonstrations), len(records.ratings), len(records.prompts)] == [1250, 8000, 1500]
    assert records.judge is not None
    first_of = {seed: simulate(seed=seed, dialogues=0, ratings=0, prompts=1).prompts for seed in (1, 2)}
    assert records.prompts[:1] == first_of[1] != first_of[2]


def test_the_simulator_takes_no_path() -> None:
    with pytest.raises(UserError, match="reads no files"):
        load_records("coffee-simulator", "own.jsonl", seed=0)


def test_taskmaster_is_read_from_a_path_or_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="perl-rlhf data fetch taskmaster-ticketing") as error:
        load_records("taskmaster-ticketing", None, seed=0)
    assert "data.path" in error.value.remedy
    folder = rows_of(tmp_path / "perl-rlhf" / "taskmaster")
    for path in (None, str(folder), str(folder / "TM-3-2020")):
        assert len(load_records("taskmaster-ticketing", path, seed=0).ratings) == 1
        assert len(load_rows("taskmaster-ticketing", path, seed=0).ratings) == 2


def test_a_cache_that_lacks_a_file_is_not_used_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = rows_of(tmp_path / "perl-rlhf" / "taskmaster")
    (folder / "TM-3-2020" / "reward" / "reward_07.json").unlink()
    with pytest.raises(UserError, match=r"there is no TM-3-2020/reward/reward_07\.json"):
        load_records("taskmaster-ticketing", None, seed=0)


def test_jsonl_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jsonl needs a file"):
        load_records("jsonl", None, seed=0)
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert len(load_rows("jsonl", str(path), seed=0).prompts) == 1


@pytest.mark.parametrize("load", [load_records, load_rows])
def test_an_unknown_source_is_refused_with_the_nearest_name(load: object) -> None:
    assert callable(load)
    with pytest.raises(UserError, match="Did you mean taskmaster-coffee") as error:
        load("taskmaster-cofee", None, 0)
    assert all((name in error.value.remedy) != ("/" in name) for name in SOURCES), "parts of sets are not listed"


def test_sources_and_files_of_the_command_line(tmp_path: Path) -> None:
    own = tmp_path / "rows.txt"
    own.touch()
    assert parse_source("coffee-simulator") == ("coffee-simulator", None)
    assert parse_source("taskmaster-coffee:some/dir") == ("taskmaster-coffee", "some/dir")
    assert parse_source("taskmaster-coffee:C:/dir") == ("taskmaster-coffee", "C:/dir")
    assert parse_source("hh-rlhf/helpful-base:some/dir") == ("hh-rlhf/helpful-base", "some/dir")
    assert parse_source("jsonl:own") == ("jsonl", "own")
    assert parse_source("not/there:1.jsonl") == ("jsonl", "not/there:1.jsonl")
    assert parse_source(str(own)) == ("jsonl", str(own))
    with pytest.raises(UserError, match="Did you mean taskmaster-ticketing"):
        parse_source("taskmaster-tickets:some/dir")
    with pytest.raises(UserError, match="names no path"):
        parse_source("taskmaster-coffee:")
