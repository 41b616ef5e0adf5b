"""`data import`: files in exactly the formats that other programs write."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from perl.data.jsonl import read_jsonl
from perl.data.records import Comparison, Demonstration, Rating, Turn
from tests.conftest import RunCli, write_rows

USER, ANSWER, OTHER = "2860fdae-4c43-4f59-8217-33dfc92b47d3", "29948ec6-6975-4d3a-b019-ceb8b7f7c698", "a-sibling"
CHATS = [
    {"role": "user", "metadata": {"title": None}, "content": "abc", "options": None},
    {"role": "assistant", "metadata": {"title": None}, "content": "Yes, =1+1", "options": None},
    {"role": "user", "metadata": None, "content": [{"type": "text", "text": "def"}], "options": None},
    {"role": "assistant", "metadata": None, "content": [{"type": "text", "text": "No"}], "options": None},
]


def feedback(rating: object, message: str = ANSWER, **data: Any) -> dict[str, Any]:
    """Return a record of Open WebUI's export: the user's message has two answers, the second of them rated."""
    messages = {
        USER: {
            "id": USER,
            "parentId": None,
            "childrenIds": [OTHER, ANSWER],
            "role": "user",
            "content": "how are you",
            "timestamp": 1760362655,
            "models": ["support"],
        },
        OTHER: {"id": OTHER, "parentId": USER, "childrenIds": [], "role": "assistant", "content": "Bad."},
        ANSWER: {
            "id": ANSWER,
            "parentId": USER,
            "childrenIds": [],
            "role": "assistant",
            "content": "I am here to help.",
            "model": "support",
            "modelIdx": 0,
            "timestamp": 1760362655,
            "sources": [],
        },
    }
    history = {"messages": messages, "currentId": OTHER}
    chat = {"id": "", "title": "New Chat", "models": ["support"], "params": {}, "history": history, "messages": []}
    return {
        "id": "6e6503ff-8f59-4995-a2f4-6b07f02a4723",
        "user_id": "e12c1cb7-f768-42a5-bb45-59846d2406fa",
        "version": 0,
        "type": "rating",
        "data": {"rating": rating, "model_id": "support", "sibling_model_ids": None, **data},
        "meta": {"model_id": "support", "message_id": message, "message_index": 1, "chat_id": "3cd6f38c"},
        "snapshot": {"chat": {"id": "3cd6f38c", "user_id": None, "title": "New Chat", "chat": chat, "meta": {}}},
        "created_at": 1760434499,
        "updated_at": 1760434500,
    }


def imported(run_cli: RunCli, source: str, file: Path, *options: str) -> tuple[Any, str]:
    """Import a file; return the records written and the console output."""
    out = file.with_name("out.jsonl")
    status, written = run_cli("data", "import", source, file, *options, "--out", out)
    assert status == 0, written
    return read_jsonl(out), written


def table(file: Path, *rows: list[str]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(rows)
    return file


def test_open_webui(run_cli: RunCli, tmp_path: Path) -> None:
    loop = feedback(1)
    loop["snapshot"]["chat"]["chat"]["history"]["messages"][USER]["parentId"] = ANSWER
    records = [
        feedback(1, reason="accurate_information", comment="Good."),
        feedback("-1", reason=None, comment=""),  # of an arena: a number as text
        feedback(None),
        feedback(1, message="gone"),
        feedback(1, message=USER),
        loop,
        {**feedback(1), "snapshot": None},
    ]
    file = tmp_path / "feedback-history-export.json"
    file.write_text(json.dumps(records))
    read, written = imported(run_cli, "open-webui", file)
    context, answer = (Turn("user", "how are you"),), Turn("agent", "I am here to help.")
    assert read.ratings == [Rating(context, answer, label, "3cd6f38c") for label in (True, False)]
    assert read.prompts[0].columns == {
        "reason": "accurate_information",
        "comment": "Good.",
        "model_id": "support",
        "rater": "e12c1cb7-f768-42a5-bb45-59846d2406fa",
        "time": 1760434500,
    }
    assert "2 rows imported, 5 left out" in written
    for number, what in {
        3: "data.rating is None",
        4: "lacks 'gone'",
        5: "by the assistant",
        6: "a cycle",
    }.items():
        assert any(f":{number}:" in line and what in line for line in written.splitlines()), what


def test_gradio_whose_header_has_a_name_too_many(run_cli: RunCli, tmp_path: Path) -> None:
    chat, time = json.dumps(CHATS), "2024-12-31 20:35:57.236605"
    file = table(
        tmp_path / "log.csv",
        ["conversation", "index", "value", "flag", "timestamp"],
        [chat, "[1, 1]", "Like", time],
        ["'" + chat, "3", "Dislike", time],  # a mark against formulas, as gradio writes it before some texts
        [chat, "1", "incorrect", time],
        [chat, "2", "Like", time],
        [chat, "9", "Like", time],
    )
    read, written = imported(run_cli, "gradio", file)
    first = (Turn("user", "abc"), Turn("agent", "Yes, =1+1"))
    assert [(rating.context, rating.answer.text, rating.label) for rating in read.ratings] == [
        (first[:1], "Yes, =1+1", True),
        ((*first, Turn("user", "def")), "No", False),
    ]
    assert "2 rows imported, 3 left out" in written
    assert "flag is 'incorrect'" in written


def test_a_table_with_named_columns(run_cli: RunCli, tmp_path: Path) -> None:
    """The format of gradio's Interface: the components' labels, then flag, username and timestamp."""
    file = table(
        tmp_path / "log.csv",
        ["Question", "component 1", "flag", "username", "timestamp"],
        ["2 + 2?", "4, or\nfour", "Up", "ann", "2024-12-31"],
        ["2 + 2?", "5", "0.25", "bob", "2024-12-31"],
        ["2 + 2?", "5", "perhaps", "bob", "2024-12-31"],
    )
    names = ("--columns", "prompt=Question,completion=component 1", "--columns", "label=flag")
    read, written = imported(run_cli, "csv", file, *names)
    ask = (Turn("text", "2 + 2?"),)
    assert read.ratings == [
        Rating(ask, Turn("text", "4, or\nfour"), True, "2 + 2?"),
        Rating(ask, Turn("text", "5"), False, "2 + 2?", probability=0.25),
    ]
    assert read.prompts[0].columns["username"] == "ann"
    assert ":5: flag is 'perhaps'" in written  # the line of the file: a cell has two

    pairs = table(
        tmp_path / "pairs.csv", ["q", "a", "b"], [json.dumps([{"role": "user", "content": "x"}]), "y", "z"]
    )
    read, _ = imported(run_cli, "csv", pairs, "--columns", "prompt=q,chosen=a,rejected=b")
    assert read.comparisons == [Comparison((Turn("user", "x"),), Turn("agent", "y"), Turn("agent", "z"), "x")]


def test_a_column_that_is_named_takes_the_place_of_one_of_the_formats_own(run_cli: RunCli, tmp_path: Path) -> None:
    file = table(tmp_path / "x.csv", ["prompt", "q", "completion"], ["Be brief.", "2 + 2?", "4"])
    read, _ = imported(run_cli, "csv", file, "--columns", "prompt=q")
    assert read.demonstrations == [Demonstration((Turn("text", "2 + 2?"),), (Turn("text", "4"),), "2 + 2?")]


def test_a_row_with_a_cell_too_many_or_too_few_is_named(run_cli: RunCli, tmp_path: Path) -> None:
    """Its cells would be read under wrong names, and without its label it would be a demonstration."""
    file = tmp_path / "x.csv"
    file.write_text("prompt,completion,label\na,b,1\n\nc,d\ne,f,0,and more\n")
    read, written = imported(run_cli, "csv", file)
    assert [rating.answer.text for rating in read.ratings] == ["b"]
    assert not read.demonstrations
    for line in (4, 5):
        assert f":{line}: has more or fewer cells than the header" in written


def test_trls_formats_from_parquet_and_json(run_cli: RunCli, tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "What color is the sky?"}]
    said = [[{"role": "assistant", "content": text}] for text in ("It is blue.", "It is green.")]
    rows: list[dict[str, Any]] = [
        {"prompt": ask, "chosen": said[0], "rejected": said[1]},
        {"chosen": [*ask, *said[0]], "rejected": [*ask, *said[1]]},
        {"prompt": ask, "completion": said[0], "label": True},
        {"prompt": ask, "completion": said[0]},
        {"messages": [*ask, *said[0]]},
    ]
    names = {name for row in rows for name in row}  # a table has all columns in all rows
    datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows]).to_parquet(
        tmp_path / "data.parquet"
    )
    (tmp_path / "data.json").write_text(json.dumps(rows))
    write_rows(tmp_path / "data.jsonl", rows)
    context, blue, key = (Turn("user", ask[0]["content"]),), Turn("agent", "It is blue."), "what color is the sky?"
    for name in ("data.parquet", "data.json", "data.jsonl"):
        read, written = imported(run_cli, "trl", tmp_path / name)
        assert "5 rows imported, 0 left out" in written
        assert read.comparisons == [Comparison(context, blue, Turn("agent", "It is green."), key)] * 2
        assert read.ratings == [Rating(context, blue, True, key)]
        assert read.demonstrations == [Demonstration(context, (blue,), key)] * 2


@pytest.mark.parametrize(
    ("source", "content", "what"),
    [
        ("open-webui", "{}", "the row has no data, meta, snapshot"),
        ("open-webui", "[", "not JSON"),
        ("open-webui", "[{}]", "the row has no data, meta, snapshot"),
        ("gradio", "a,b\n1,2\n", "has no conversation, index, flag"),
        ("csv", "a,b\n1,2\n", "the fields ['a', 'b'] fit no format"),
        ("csv --columns label=ratng", "prompt,completion,rating\na,b,1\n", "no row has ratng"),
        ("csv --columns lable=rating", "prompt,completion,rating\na,b,1\n", "no field 'lable'"),
        ("csv --columns prompt", "prompt\na\n", "'prompt' is not FIELD=NAME"),
        ("csv", 'a,b\n"1,2\n', "unexpected end of data"),
        ("csv", "", "it is empty"),
        ("csv", b"\xff", "is not UTF-8: byte 0xff"),
        ("json", "", "'json' is not one of open-webui, gradio, trl, csv"),
    ],
)
def test_what_is_not_of_the_format_is_an_error(
    source: str, content: str | bytes, what: str, run_cli: RunCli, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    status, written = run_cli("data", "import", *source.split(), file)
    assert status == 2
    assert what in written


def test_a_broken_parquet_file_and_none(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("x")
    for name, what in (("x.parquet", "is not a Parquet file"), ("none.csv", "cannot be read")):
        status, written = run_cli("data", "import", "trl", tmp_path / name)
        assert status == 2
        assert what in written
