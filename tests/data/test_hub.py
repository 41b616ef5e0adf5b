"""Data sets by id: folders in a repository's layout, which the datasets library reads in the same way."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from perl.data.sources import load_records
from perl.data.splits import split
from perl.errors import MachineError, UserError

ROWS = [{"question": f"What is {n}?", "reply": f"It is {n}.", "thumb": n % 2 == 0} for n in range(8)]
COLUMNS = {"prompt": "question", "completion": "reply", "label": "thumb"}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with a training and a test split that share a row."""
    folder = tmp_path / "thumbs"
    folder.mkdir()
    for name, rows in (("train", ROWS[:6]), ("test", ROWS[5:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_test_split_is_held_out(repository: Path) -> None:
    """Rows that it shares with other splits are held out too."""
    records = load_records("hub", str(repository), 0, COLUMNS)
    train, held_out = split(records, 0.2, 0)
    assert (len(train.ratings), len(held_out.ratings)) == (5, 3)
    assert records.problems == []


def test_a_split_by_name(repository: Path) -> None:
    """It is the only data, and a share of it is held out."""
    records = load_records("hub", f"{repository}:train", 0, COLUMNS)
    assert len(records.ratings) == 6
    assert not records.published_test


@pytest.mark.parametrize(
    ("path", "words"),
    [("{}:dev", "there is no split 'dev'"), ("{}", "data.columns"), (None, "hub needs a data set")],
)
def test_what_cannot_be_read(repository: Path, path: str | None, words: str) -> None:
    """Unknown split, other column names, invalid id."""
    with pytest.raises(UserError, match=words):
        load_records("hub", path and path.format(repository), 0)


def test_an_id_without_a_network() -> None:
    """It is not a user's error, and the message says where to look."""
    with pytest.raises(MachineError, match=r"Check data\.path, an id or ID:SPLIT, and the network"):
        load_records("hub", "nobody/no-such-data-set", 0)
