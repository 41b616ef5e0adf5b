"""The registry: every source by its name, and wrong names and paths."""

import json
import runpy
from pathlib import Path

import pytest

from perl.commands.data import check
from perl.data.fetch import TASKMASTER, pins
from perl.data.records import Problem, Records
from perl.data.simulator.source import simulate
from perl.data.sources import SOURCES, load_records, load_rows, parse_source
from perl.data.tables import columns_in
from perl.errors import UserError
from perl.recipe import load_recipe
from perl.stages.material import read_data
from tests.conftest import WriteRecipe


def rows_of(folder: Path) -> Path:
    """Write a release of Ticketing with one rated turn, twice."""
    context = json.dumps([{"role": "user", "text": "a"}])
    row = {"context": context, "generation": json.dumps({"role": "agent", "text": "b"}), "reward": 1.0}
    for pin in pins("TM-3-2020", TASKMASTER):
        path = folder / pin.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    (folder / "TM-3-2020" / "reward" / "reward_00.json").write_text(json.dumps([row, row]))
    return folder


def test_the_simulator_is_drawn_from_the_seed(simulated: Records) -> None:
    records = simulated
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
    with pytest.raises(UserError, match=r"no TM-3-2020/reward/reward_07\.json"):
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


def test_a_home_that_the_shell_left_unexpanded_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash does not expand `--data=~/thumbs.csv`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "thumbs.csv").write_text("question,response,rating\na,b,1\n")
    for text in ("~/thumbs.csv", "jsonl:~/thumbs.csv"):
        name, path = parse_source(text)
        assert (name, path) == ("jsonl", str(tmp_path / "thumbs.csv"))
    assert columns_in(Path(str(path)))["label"] == "rating"


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
    with pytest.raises(UserError, match="has no path"):
        parse_source("taskmaster-coffee:")


@pytest.fixture
def stars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Register the example of a source outside the package for one test, and return a file that it reads."""
    monkeypatch.setattr("perl.data.sources.SOURCES", dict(SOURCES))
    runpy.run_path(str(Path(__file__).with_name("example_source.py")))
    rows = "".join(f"Question {n}?,Answer {n}.,{n % 5 + 1}\n" for n in range(40))
    file = tmp_path / "answers.csv"
    file.write_text(f"question,answer,stars\n{rows}Why?,Because.,many\n")
    return file


def test_a_source_outside_the_package_feeds_a_recipe(stars: Path, write_recipe: WriteRecipe) -> None:
    data = {"source": "stars", "path": str(stars), "held_out": 0.25}
    recipe = load_recipe(write_recipe(data=data, sft={}))
    train, held_out = read_data(recipe)
    sides = [[len(side.demonstrations), len(side.ratings), len(side.prompts)] for side in (train, held_out)]
    assert [sum(counts) for counts in zip(*sides, strict=True)] == [8, 40, 40]
    assert sides[1] == [2, 10, 10]
    assert [rating.label for rating in train.ratings].count(True) == 12
    assert train.problems == [Problem(f"{stars}, row 41", "stars is 'many'; 1 to 5 expected")]


@pytest.mark.parametrize("named", ["source", "recipe"])
def test_a_source_outside_the_package_is_described(
    named: str, stars: Path, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(data={"source": "stars", "path": stars.name})
    assert check(str(recipe) if named == "recipe" else f"stars:{stars}") == 2
    printed = capsys.readouterr().out
    assert printed.startswith("stars: questions and answers with one to five stars; CC0\n")
    assert "16 thumbs up, 24 down" in printed
    assert "stars is 'many'; 1 to 5 expected" in printed


@pytest.mark.parametrize(
    ("path", "what"),
    [
        (None, "stars needs a file"),
        ("gone.csv", "there is no such file"),
        (".", "is a folder"),
        ("latin.csv", "cannot be read: 'utf-8' codec"),
        ("empty.csv", "no usable row: it is empty"),
    ],
)
def test_files_that_any_source_cannot_read_are_user_errors(stars: Path, path: str | None, what: str) -> None:
    (stars.parent / "latin.csv").write_bytes(b"question,answer,stars\nWhy?,caf\xe9,5\n")
    (stars.parent / "empty.csv").touch()
    with pytest.raises(UserError) as error:
        load_records("stars", path and str(stars.parent / path), seed=0)
    assert what in str(error.value)
    assert "data.path" in str(error.value)


def test_the_readme_lists_every_source_with_its_licence() -> None:
    readme = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    table = readme.partition("\n## ")[0].splitlines()
    rows = {line.split("`")[1]: line for line in table if line.startswith("| `")}
    for name, source in SOURCES.items():
        if "/" not in name:  # the parts of sets are told below the table
            assert source.description
            assert source.licence in rows[name]
