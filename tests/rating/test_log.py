"""The file of ratings: its content, which rating counts, and durability of saved ratings."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perl.data.jsonl import read_jsonl
from perl.data.records import Comparison, Demonstration, Rating, Records, Turn
from perl.errors import MachineError, UserError
from perl.rating.log import Opinion, RatingLog
from perl.rating.questions import Question
from perl.rating.summary import summarize
from tests.rating.asking import CHAT, one, two

UP, DOWN = Opinion(label=True), Opinion(label=False)
Write = Callable[[int, Any], int]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ratings.jsonl"


def read(file: Path) -> Records:
    """Read the file as `data.source: jsonl` does."""
    return read_jsonl(file)


def test_each_opinion_is_a_row_of_its_kind_with_all_that_is_known_of_it(file: Path) -> None:
    log = RatingLog(file)
    log.add(one("What size?"), "ann", UP)
    log.add(two("Large?", "No."), "ann", Opinion(better=1))
    log.add(one("Hm."), "ann", Opinion(correction="One latte."))
    records = read(file)
    assert records.ratings == [Rating(CHAT, Turn("agent", "What size?"), True, "d1")]
    assert records.comparisons == [
        Comparison(CHAT, Turn("agent", "No."), Turn("agent", "Large?"), "d1"),
        Comparison(CHAT, Turn("agent", "One latte."), Turn("agent", "Hm."), "d1"),
    ]
    assert records.demonstrations == [Demonstration(CHAT, (Turn("agent", "One latte."),), "d1")]
    assert not records.problems
    (prompt,) = records.prompts
    assert prompt.columns == {}, "what is known of a rating is no column of its prompt"
    first = json.loads(file.read_text().splitlines()[0])
    assert {"id", "question", "rater", "time", "chosen_by", "shown"} == first["rated"].keys()
    (shown,) = first["rated"]["shown"]
    assert shown == {
        **{"text": "What size?", "role": "policy", "base_sha256": "base", "adapter_sha256": "adapter"},
        **{"temperature": 1.0, "max_new_tokens": 8, "seed": 5, "place": 0, "of": 1},
    }


def test_a_correction_of_plain_text_keeps_the_space_that_joins_it_to_the_prompt(file: Path) -> None:
    """The page's text field gives it without; a reward model would learn the space, not the answer."""
    text = (Turn("text", "Q: What is 2 + 2?\nA:"),)
    log = RatingLog(file)
    for number, correction in enumerate(("4", "  4", "4\n")):
        drawn = one(f" {number + 5}").completions
        log.add(Question(text, "d", drawn, "random"), "ann", Opinion(correction=correction))
    records = read(file)
    assert [pair.better.text for pair in records.comparisons] == [" 4", "  4", " 4\n"]
    assert [one.answer[0].text for one in records.demonstrations] == [" 4", "  4", " 4\n"]


def test_the_last_word_on_the_same_wins_and_each_rater_has_one(file: Path) -> None:
    log = RatingLog(file)
    log.add(one(), "ann", UP)
    log.add(one(), "bo", UP)
    log.add(one(), "ann", Opinion(correction="One latte."))
    log.add(one(), "ann", DOWN)
    records = read(file)
    assert [rating.label for rating in records.ratings] == [True, False]
    assert (records.demonstrations, records.comparisons) == ([], []), "the pair of the correction is gone too"


def test_undo_takes_back_the_raters_last_and_asks_it_again(file: Path) -> None:
    log = RatingLog(file)
    log.add(one("a"), "ann", UP)
    log.add(one("b"), "ann", Opinion(correction="c"))
    log.add(one("d"), "bo", UP)
    assert log.undo("ann") == one("b")
    assert [rating.answer.text for rating in read(file).ratings] == ["a", "d"]
    assert not read(file).comparisons
    log.close()
    log = RatingLog(file)
    assert log.undo("ann") == one("a"), "also of what was saved before the server was started"
    assert log.undo("ann") is None
    assert len(file.read_text().splitlines()) == 4 + 3, "nothing is ever removed from the file"


@pytest.mark.parametrize(
    ("question", "opinion"),
    [
        (one(), Opinion()),
        (one(), Opinion(better=0)),
        (two(), UP),
        (two(), Opinion(better=2)),
        (two(), Opinion(correction="x")),
        (one(), Opinion(label=True, correction="x")),
        (one(), Opinion(correction=" ")),
        (one("a"), Opinion(correction=" a")),
        (one(), Opinion(correction="\ud800")),
    ],
)
def test_an_opinion_that_does_not_fit_is_refused_and_not_written(
    question: Any, opinion: Opinion, file: Path
) -> None:
    with pytest.raises(UserError):
        RatingLog(file).add(question, "ann", opinion)
    assert file.read_text() == ""


def test_a_full_disk_leaves_what_was_saved_and_nothing_of_what_was_not(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write = RatingLog(file), os.write
    log.add(one("a"), "ann", UP)
    before = file.read_bytes()

    def full(descriptor: int, data: Any) -> int:
        if len(data) > 100:
            return write(descriptor, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(MachineError, match="No space left"):
        log.add(one("b"), "ann", DOWN)
    assert file.read_bytes() == before
    monkeypatch.undo()
    log.add(one("b"), "ann", DOWN)
    assert [rating.label for rating in read(file).ratings] == [True, False]


def test_a_killed_server_loses_nothing_that_it_called_saved(file: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        log = RatingLog(file)
        for number in range(100_000):
            log.add(one(f"text {number}"), "ann", UP)
            os.write(writing, b".")
    saved = 0
    while saved < 20:
        saved += len(os.read(reading, 1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writing)
    saved += len(os.read(reading, 100_000))
    with file.open("ab") as torn:
        torn.write(b'{"prompt": [{"role": "us')
    log = RatingLog(file)
    assert len(log.entries) in (saved, saved + 1)
    log.add(one("more"), "ann", UP)
    records = read(file)
    assert not records.problems
    assert [rating.answer.text for rating in records.ratings][:saved] == [f"text {n}" for n in range(saved)]


def test_one_process_writes_it_and_rows_of_others_stay(file: Path) -> None:
    file.write_text('{"prompt": "a", "completion": "b", "label": 1, "rated": "by hand"}')
    log = RatingLog(file)
    assert log.entries == {}
    log.add(one(), "ann", UP)
    assert [rating.dialogue for rating in read(file).ratings] == ["a", "d1"]
    assert read(file).prompts[0].columns == {"rated": "by hand"}
    with pytest.raises(UserError, match="another `rate` is writing this file"):
        RatingLog(file)
    with pytest.raises(UserError, match="cannot be written"):
        RatingLog(file.parent / "none" / "ratings.jsonl")
    log.close()
    file.write_text('{"prompt": "a", "completion": "b", "label": 1, "rated": {"id": "1"}}\n')
    with pytest.raises(
        UserError, match=r"ratings.jsonl:1: is not a rating in the format of rate: rated.question: Field"
    ):
        RatingLog(file)


def test_a_label_that_was_changed_by_hand_counts_by_its_side(file: Path) -> None:
    log = RatingLog(file)
    log.add(one(), "ann", UP)
    log.close()
    file.write_text(file.read_text().replace('"label": true', '"label": 0.3'))
    assert summarize(RatingLog(file).entries.values(), ["policy"]).roles[0].up == 0
