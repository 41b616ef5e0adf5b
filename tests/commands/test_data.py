"""`data check`: the metrics, the bad rows and the exit status."""

import json
from pathlib import Path

import pytest

from perl.commands.data import balance, check, counts, sizes
from perl.data.records import Comparison, Demonstration, Prompt, Rating, Records, Turn
from perl.errors import UserError

ASK = (Turn("user", "12345"),)
CALL, TEXT, OTHER = Turn("agent", "call a {}"), Turn("agent", "text"), Turn("agent", "b")


def write(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def test_each_kind_in_numbers() -> None:
    records = Records(
        demonstrations=[Demonstration(ASK, (CALL, Turn("api", "{}"), TEXT), "a")],
        ratings=[Rating(ASK, TEXT, True, "a"), Rating(ASK * 2, CALL, False, "b")],
        comparisons=[Comparison(ASK, TEXT, CALL, "c")],
        prompts=[Prompt(ASK, "a", {"x": 1}), Prompt(ASK, "a", {"x": 2})],
    )
    found = {kind: " ".join(counts(rows).values()) for kind, rows in records.by_kind().items()}
    assert list(counts(records.prompts)) == ["rows", "dialogues", "duplicates", "agent's calls", "agent's texts"]
    assert found == {
        "demonstrations": "1 1 0 1 1",  # the API's turn is neither call nor text of the agent
        "ratings": "2 2 0 1 1",
        "comparisons": "1 1 0 1 1",
        "prompts": "2 1 0 0 0",  # no duplicate: the columns differ
    }
    assert list(sizes(records.ratings).values()) == ["2/2/2", "10/10/10", "9/9/9"]
    assert sizes(records.demonstrations)["answer: characters"] == "15/15/15"
    assert sizes(records.prompts)["answer: characters"] == "–"


def test_spread_is_median_95_percent_and_longest() -> None:
    prompts = [Prompt((Turn("user", "x" * n),), "a") for n in range(1, 101)]
    assert sizes(prompts)["characters"] == "51/95/100"


def test_labels_duplicates_and_contradictions() -> None:
    ratings = [
        Rating(ASK, TEXT, True, "a"),
        Rating(ASK, TEXT, True, "a"),  # a duplicate
        Rating(ASK, CALL, False, "a"),  # a pair with the first
        Rating(ASK * 2, OTHER, True, "a"),
        Rating(ASK * 2, OTHER, False, "a"),  # a contradiction, and no pair
    ]
    assert counts(ratings)["duplicates"] == "1"
    assert balance(ratings) == (
        "3 thumbs up, 2 down: a constant prediction is right for 60.0%; 1 answer with both labels; "
        "1 context with both labels, which yield 1 pair"
    )


def test_a_file_without_a_fault_is_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, True, True, False)]
    assert check(write(tmp_path, *map(json.dumps, rows))) == 0
    printed = capsys.readouterr().out
    assert "3 thumbs up, 1 down: a constant prediction is right for 75.0%; 1 answer with both labels" in printed
    assert "1 dialogue in all" in printed
    assert "every row is usable" in printed


def test_copies_of_a_prompt_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rated = [{"prompt": "c", "completion": "b", "label": label} for label in (True, False)]
    rows = [*({"prompt": text} for text in "aaab"), {"prompt": "a", "colour": "red"}, *rated]
    assert check(write(tmp_path, *map(json.dumps, rows))) == 0
    assert "2 rows with only a prompt: copies of earlier prompts, left out" in capsys.readouterr().out.splitlines()


def test_rows_that_say_how_sure_they_are_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rating = {"prompt": "a", "completion": "b"}
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    certain = [{**rating, "label": 1}, {**pair, "margn": 2}, pair]
    soft = [{**rating, "label": 0.2}, {**pair, "margin": 2}, {**pair, "probability": 0.9}, {**pair, "margin": 1}]
    assert check(write(tmp_path, *map(json.dumps, certain))) == 0
    printed = capsys.readouterr().out
    assert "soft" not in printed
    assert "margin" not in printed
    assert check(write(tmp_path, *map(json.dumps, certain + soft))) == 0
    expected = "1 soft label; 2 comparisons with a margin; 1 comparison with a probability"
    assert expected in capsys.readouterr().out.splitlines()


def test_bad_rows_are_printed_one_a_line_and_are_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = json.dumps({"prompt": "a", "completion": "b" * 200, "label": "[red]" + "c" * 200})
    path = write(tmp_path, '{"prompt": "a"}', bad, "oops")
    assert check(path) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{path}:2: label is '[red]ccc") for line in lines), "no markup, no break"
    assert any(line.startswith(f"{path}:3: not JSON") for line in lines)
    assert lines[-1] == "2 rows left out"


def test_columns_that_are_not_read_are_no_clean_bill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, json.dumps({"prompt": "a", "response": "b", "rating": 1}))
    assert check(path) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "every row is usable, but columns are left out"
    assert check(path, {"completion": "response", "label": "rating"}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "every row is usable"


def test_only_the_first_fifty_bad_rows_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(write(tmp_path, '{"prompt": "a"}', *["oops"] * 60))
    lines = capsys.readouterr().out.splitlines()
    assert sum("not JSON" in line for line in lines) == 50
    assert lines[-2:] == ["… and 10 more", "60 rows left out"]


def test_no_usable_row_and_no_such_source_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable row"):
        check(write(tmp_path, "oops"))
    with pytest.raises(UserError, match="no source 'nothing'"):
        check("nothing")
