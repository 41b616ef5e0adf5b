"""Files of rows in other formats and with other column names."""

import csv
import gzip
import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from perl.data.jsonl import read_jsonl
from perl.data.records import Turn
from perl.errors import UserError
from tests.conftest import RunCli

ROWS = [
    {"question": "a, b?", "response": 'say "x"\nand y', "rating": True},
    {"question": "c", "response": "d", "rating": False},
]
COLUMNS = {"prompt": "question", "completion": "response", "label": "rating"}


def test_every_form_gives_the_same_records(tmp_path: Path) -> None:
    """The files are written by pandas, in the formats that users have."""
    table = pandas.DataFrame(ROWS)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    table.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    expected = read_jsonl(tmp_path / "rows.jsonl", COLUMNS)
    assert [rating.label for rating in expected.ratings] == [True, False]
    assert expected.ratings[0].answer.text == 'say "x"\nand y'
    for form in ("csv", "tsv", "parquet", "json"):
        found = read_jsonl(tmp_path / f"rows.{form}", COLUMNS)
        assert (found.ratings, found.prompts, found.problems) == (expected.ratings, expected.prompts, []), form


@pytest.mark.parametrize("columns", [{}, {"prompt": "q", "completion": "a"}])
def test_chats_stored_as_json_text_are_messages_in_every_form(columns: dict[str, str], tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    texts = [json.dumps(said[:1]), '[{"role": "admin"}]', json.dumps([said[0], {"role": "user"}])]
    question, answer = (columns.get(name, name) for name in ("prompt", "completion"))
    table = pandas.DataFrame({question: texts, answer: [json.dumps(said[1:]), '[{"n": 1}]', "?"]})
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    for form in ("csv", "parquet", "jsonl"):
        found = read_jsonl(tmp_path / f"rows.{form}", columns)
        chat, text = found.demonstrations
        assert (chat.context[0], chat.answer[0]) == (Turn("user", "Hi"), Turn("agent", "Hello!")), form
        assert (text.context[0], text.answer[0]) == (Turn("text", texts[1]), Turn("text", '[{"n": 1}]')), form
        (problem,) = found.problems
        assert problem.what.startswith(f"{question}[1] is {{'role': 'user'}}"), form


def test_messages_that_pandas_wrote_into_cells_are_read_and_never_taken_for_text(tmp_path: Path) -> None:
    said = [{"role": "user", "content": 'It\'s "5"?\n'}, {"role": "assistant", "content": "No."}]
    rows = [{"prompt": said[:1], "completion": said[1:]}, {"prompt": said[:1], "completion": "Yes."}]
    file = tmp_path / "rows.csv"
    pandas.DataFrame(rows).to_csv(file, index=False)
    texts = [(one.context[0].text, one.answer[0].text) for one in read_jsonl(file).demonstrations]
    assert texts == [(said[0]["content"], "No."), (said[0]["content"], "Yes.")]
    pandas.DataFrame({"messages": [numpy.array(said, dtype=object)]}).to_csv(file, index=False)  # without commas
    (problem,) = read_jsonl(file).problems
    assert problem.what == "messages has messages, but neither as JSON nor as a list in Python"


def test_what_json_has_no_form_for_is_text_in_the_rows_of_parquet(run_cli: RunCli, tmp_path: Path) -> None:
    now, no_value = datetime(2026, 1, 2, 3), float("nan")
    row = {
        "prompt": "a",
        "completion": "b",
        "label": 1.0,
        "time": [now],
        "price": Decimal("1.5"),
        "stars": no_value,
    }
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, {**row, "label": float("inf")}]), file)
    found = read_jsonl(file)
    assert found.prompts[0].columns == {"time": ["2026-01-02 03:00:00"], "price": "1.5"}
    assert [problem.what for problem in found.problems] == [
        "label is 'inf'; true or false (or 1, 0), or a number between, expected"
    ]
    status, written = run_cli("data", "import", "trl", file)
    assert status == 0, written
    assert '"price": "1.5"' in written


def test_text_in_bytes_and_decimal_labels_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    row = {"prompt": "ä".encode(), "completion": b"b", "label": Decimal("1.0"), "image": b"\xff\xd8"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    found = read_jsonl(file)
    assert found.problems == []
    (rating,) = found.ratings
    assert (rating.context[0].text, rating.answer.text, rating.label) == ("ä", "b", True)
    assert found.prompts[0].columns == {"image": r"b'\xff\xd8'"}


def test_a_compressed_array_is_read_and_a_broken_one_reported(tmp_path: Path) -> None:
    file = tmp_path / "rows.json.gz"
    file.write_bytes(gzip.compress(b'[{"prompt": "a", "completion": "b"}]'))
    assert len(read_jsonl(file).demonstrations) == 1
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="is not a complete gzip file"):
        read_jsonl(file)


def test_labels_in_cells(tmp_path: Path) -> None:
    words = {"up": True, "👎": False, "1": True, "0": False, "TRUE": True, "no": False, "0.7": True}
    lines = [f"p{n},c,{word}" for n, word in enumerate(words)]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion,label", *lines, "p,c,maybe", "p,c,1,x"]))
    found = read_jsonl(tmp_path / "a.csv")
    assert [rating.label for rating in found.ratings] == list(words.values())
    assert found.ratings[-1].probability == 0.7
    assert [problem.where.rpartition(":")[2] for problem in found.problems] == ["9", "10"]
    assert "label is 'maybe'" in found.problems[0].what
    assert "more or fewer cells than the header" in found.problems[1].what


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"prompt": "a", "response": "b", "rating": 1}, "{completion: response, label: rating}"),
        ({"question": "a", "answer": "b", "thumbs": 1}, "{prompt: question, completion: answer, label: thumbs}"),
        ({"prompt": "a", "completion": "b", "score": 1}, "{label: score}"),
        ({"Prompt": "a", "Completion": "b", "Label": 1}, "{prompt: Prompt, completion: Completion, label: Label}"),
    ],
)
def test_ratings_under_other_names_are_recognised(
    row: dict[str, object], mapping: str, run_cli: RunCli, tmp_path: Path
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({**row, next(iter(row)): f"a{n}"}) + "\n" for n in range(3)))
    _, written = run_cli("data", "check", file)
    assert f"add data.columns: {mapping}" in " ".join(written.split())


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    """A mistyped name would silently turn ratings into demonstrations."""
    file = tmp_path / "own.csv"
    file.write_text("question,response,rating\na,b,up\n")
    found = read_jsonl(file, COLUMNS | {"label": "Rating"})
    assert (len(found.ratings), len(found.demonstrations)) == (0, 1)
    assert found.notes == ["data.columns names Rating, which no row has"]
    found = read_jsonl(file, {"prompt": "Question"})
    assert "data.columns names Question, which no row has" in found.problems[0].what


def test_what_is_read_as_it_is_gets_no_advice(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b", "label": True, "rating": 3}) + "\n")
    assert read_jsonl(file).notes == []


@pytest.mark.parametrize(
    ("separator", "encoding"), [(";", "utf-8-sig"), (";", "utf-16"), ("\t", "utf-16"), (",", "utf-16-be")]
)
def test_what_spreadsheets_call_csv_is_read(separator: str, encoding: str, tmp_path: Path) -> None:
    rows = [["prompt", "completion", "label"], ["a tea; please", '"one, café"', "1"], ["b", "no\n→", "0"]]
    with (file := tmp_path / "own.csv").open("w", encoding=encoding, newline="") as out:
        out.write("\ufeff" if encoding == "utf-16-be" else "")
        csv.writer(out, delimiter=separator).writerows(rows)
    found = read_jsonl(file)
    assert [(rating.context[-1].text, rating.answer.text, rating.label) for rating in found.ratings] == [
        ("a tea; please", '"one, café"', True),
        ("b", "no\n→", False),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("own.xlsx", b"PK", ".xlsx files are not supported"),
        ("own.parquet", b"nothing", "is not a Parquet file"),
        ("own.json", b"[1, 2", "is not a JSON array"),
        ("own.csv", b'prompt,completion\n"a,b\n', "is not valid CSV"),
        ("own.csv", b"prompt\ncaf\xe9\n", "is not UTF-8: byte 0xe9"),
        ("own.csv.gz", b"", "compressed .csv files are not supported"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_jsonl(tmp_path / name)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "own.csv").write_text("prompt,completion,label,label\na,b,0,1\n")
    with pytest.raises(UserError, match="has the column 'label' twice"):
        read_jsonl(file)


def test_names_with_spaces_long_cells_and_labels_of_minus_one(tmp_path: Path) -> None:
    """Such tables are written by people and by pandas."""
    text = "x " * 100_000
    (file := tmp_path / "own.csv").write_text(f"prompt, completion, label\na,b,1.0\nc,d,-1.0\n{text},e,-1\n")
    assert [rating.label for rating in read_jsonl(file).ratings] == [True, False, False]
    (lines := tmp_path / "own.jsonl").write_text(
        '{"prompt": "a", "completion": "b", "label": 1, "conversation_id": 3.0}\n'
        '{"prompt": "c", "completion": "d", "label": -1, "conversation_id": 3}\n'
    )
    ratings = read_jsonl(lines).ratings
    assert [rating.label for rating in ratings] == [True, False]
    assert {rating.dialogue for rating in ratings} == {"3"}


def test_messages_in_a_cell_are_read_and_a_completion_in_json_is_text(tmp_path: Path) -> None:
    messages, items = '[{"role": "user", "content": "Two."}]', '[{"item": "latte"}]'
    frame = pandas.DataFrame({"prompt": [messages], "completion": [items], "label": [1]})
    frame.to_csv(file := tmp_path / "own.csv", index=False)
    rating = read_jsonl(file).ratings[0]
    assert (rating.context[0].speaker, rating.context[0].text, rating.answer.text) == ("user", "Two.", items)
