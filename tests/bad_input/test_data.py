"""Data that cannot be used: whole files, and single rows."""

import gzip
from pathlib import Path

import pytest

from tests.bad_input.cases import Case, contents, named, user
from tests.bad_input.conftest import Refused, RefusedIn
from tests.conftest import RunCli, WriteRecipe, write_rows

LONG = "please " * 400

CASES = [
    Case(
        "no such source", ("no source 'jsonll'", "data.source", "mean jsonl?"), overrides=("data.source=jsonll",)
    ),
    Case("NUL in the path", ("embedded null byte", "a\0b", "data.path"), overrides=('data.path="a\\0b"',)),
    Case("half a surrogate", ("cannot be read", "data.path", "data.path"), overrides=('data.path="\\ud800"',)),
    Case("a path too long", ("File name too long", "xxx", "data.path"), overrides=(f"data.path={'x' * 5000}",)),
    Case("no such file", ("no such file", "gone.jsonl", "Check data.path"), overrides=("data.path=gone.jsonl",)),
    Case("nobody's home", ("no such file", "~nobody-here", "data.path"), overrides=("data.path=~nobody-here/x",)),
    Case("no path", ("needs a file", "data.path", "Set data.path"), overrides=("data.path=",)),
    Case("a folder", ("is a folder", "a file expected", "Set data.path"), overrides=("data.path=.",)),
    Case("empty data", ("it is empty", "own.jsonl", "one JSON object per line"), rows=b""),
    Case("only blank lines", ("it is empty", "own.jsonl", "one JSON object per line"), rows=b"\n \n"),
    Case(
        "UTF-16",
        ("no usable row", "own.jsonl:1: not UTF-8", "Write rows with"),
        rows='{"prompt": "a"}'.encode("utf-16"),
    ),
    Case("a zip file", ("no usable row", "own.jsonl:1:", "Write rows with"), rows=b"PK\x03\x04\0\0\xff\n"),
    Case("no JSON", ("no usable row", "own.jsonl:1", "one JSON object per line"), rows=b"prompt,label\n"),
    Case(
        "no fields",
        ("fit no format", "['text', 'stars']", "{"),
        rows=[{"text": "A latte", "stars": 5}],
    ),
    Case(
        "one class",
        ("all", "thumbs up: there is nothing to distinguish", "Add ratings of the other kind"),
        rows=[{"prompt": user(f"{n}"), "completion": "Yes.", "label": True} for n in range(9)],
    ),
    Case(
        "one dialogue",
        ("1 dialogue cannot be split", "data.held_out", "Use more data"),
        rows=[{"prompt": user("Hi"), "completion": text, "label": text == "a"} for text in "ab"],
    ),
    Case(
        "copies of one prompt",
        ("1 dialogue cannot be split", "29 rows with only a prompt: copies of earlier prompts", "Use more data"),
        rows=[{"prompt": user("Hi")}] * 30,
        changes={"reward": None},
    ),
    Case(
        "one demonstration for SFT",
        (
            "its demonstrations (1) all come from dialogues that belong together",
            "nothing to evaluate sft on",
            "Use more data",
        ),
        rows=[
            {"prompt": user("Hi"), "completion": "Yes."},
            *({"prompt": user(f"{n}"), "completion": "Yes.", "label": n > 3} for n in range(9)),
        ],
        changes={"sft": {}},
    ),
    Case(
        "prompts for a reward model",
        ("no ratings or comparisons", "which reward needs", "Use another source"),
        rows=[{"prompt": user(f"{n}")} for n in range(9)],
    ),
    Case(
        "no pairs",
        ("neither pairs nor", "reward.loss", "reward.loss: thumbs"),
        rows=[{"prompt": user(f"{n}"), "completion": "Yes.", "label": n % 2} for n in range(20)],
        overrides=("reward.loss=pairs",),
    ),
    Case(
        "ratings for SFT",
        ("no demonstrations", "which sft needs", "add rows with prompt and completion"),
        changes={"sft": {}},
    ),
    Case(
        "prompt too long",
        ("a prompt has", "please please", "rl.max_prompt_length"),
        rows=[{"prompt": user(f"{n} {LONG}"), "completion": "Yes.", "label": n % 2} for n in range(20)],
    ),
    Case(
        "answer too long",
        ("no room for prompts", "completions of 256", "Lower rl.max_new_tokens"),
        overrides=("rl.max_new_tokens=256",),
    ),
    Case(
        "chat and text",
        ("5 of plain text and 1 of messages", "data.source jsonl", "Write all prompts as text"),
        rows=[{"prompt": user("a")} if n % 2 else {"prompt": f"{n}"} for n in range(9)],
        changes={"reward": None},
    ),
    Case(
        "no reward function",
        ("no such Python file", "gone.py:f", "Give FILE.py:NAME"),
        overrides=("rl.reward.function=gone.py:f",),
    ),
    Case(
        "no name in it",
        ("has no function 'f'", "own.py", "FILE.py:NAME"),
        overrides=("rl.reward.function=own.py:f",),
    ),
    Case("no function", ("has no function", "number", "Give"), overrides=("rl.reward.function=own.py:number",)),
    Case(
        "broken Python",
        ("cannot be imported", "bad.py", "Fix the file"),
        overrides=("rl.reward.function=bad.py:f",),
    ),
]

ROWS = {
    "truncated JSON": (b'{"prompt": "a", "completion": "b', "not JSON: "),
    "no object": (b'"a"', "the row is text; an object expected"),
    "a number for a prompt": (b'{"prompt": 3, "completion": "b"}', "prompt is a number"),
    "null for an answer": (b'{"prompt": "a", "completion": null}', "completion is null"),
    "a list of numbers for messages": (b'{"messages": [1, 2]}', "an object with role and content expected"),
    "a NaN label": (b'{"prompt": "a", "completion": "b", "label": NaN}', "NaN is not JSON"),
    "an infinite label": (b'{"prompt": "a", "completion": "b", "label": 1e999}', "1e999 is too large a number"),
    "a label above 1": (
        b'{"prompt": "a", "completion": "b", "label": 1.5}',
        "true or false (or 1, 0), or a number between",
    ),
    "a label in words": (b'{"prompt": "a", "completion": "b", "label": "maybe"}', "label is 'maybe'"),
    "both labels": (
        b'{"prompt": "a", "completion": "b", "label": true, "label": false}',
        "the field 'label' occurs twice",
    ),
    "a thumb and a pair": (
        b'{"prompt": "a", "completion": "b", "label": true, "chosen": "b", "rejected": "c"}',
        "fit no format",
    ),
    "the same answer twice": (b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "are the same"),
    "a margin below zero": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}',
        "margin is -1; a number from 0",
    ),
    "a margin and a probability": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1, "probability": 0.9}',
        "only one is allowed",
    ),
    "10 MB in a line": (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', "longer than 10,000,000 bytes"),
    "Latin-1": ('{"prompt": "café"}'.encode("latin-1"), "not UTF-8: byte 0xe9"),
    "half a surrogate pair": (b'{"prompt": "a\\ud800"}', "unpaired surrogate"),
    "NUL bytes": (b'{"prompt": "a\0"}', "NUL"),
    "an empty prompt": (b'{"prompt": " ", "completion": "b"}', "prompt is empty"),
    "an empty answer": (b'{"prompt": "a", "completion": ""}', "completion is empty"),
    "no turn": (b'{"prompt": [], "completion": "b"}', "prompt is empty"),
    "an empty turn": (
        b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "completion": "b"}',
        "prompt[1].content is empty",
    ),
    "an unknown role": (
        b'{"prompt": [{"role": "bot", "content": "a"}]}',
        "unknown role 'bot'; one of system, user",
    ),
    "no role": (b'{"prompt": [{"content": "a"}]}', "an object with role and content expected"),
    "an answer by the user": (
        b'{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}',
        "one by the assistant expected",
    ),
    "nested too deeply": (b'{"prompt": "a", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deeply"),
    "words that look like markup": (b'{"prompt": [{"role": "[/red]", "content": "a"}]}', "unknown role '[/red]'"),
}


@pytest.mark.parametrize(("line", "says"), ROWS.values(), ids=ROWS)
def test_a_bad_row_is_refused_where_it_is_alone_and_named_where_it_is_not(
    line: bytes, says: str, refused: Refused, run_cli: RunCli, tmp_path: Path
) -> None:
    refused(Case("alone", (says, "own.jsonl:1: ", "one JSON object per line"), rows=line))
    good = b'{"prompt": "a", "completion": "b", "label": true}'
    (tmp_path / "own.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    before = contents(tmp_path)
    status, written = run_cli("data", "check", "own.jsonl")
    assert status == 2
    assert "own.jsonl:2: " in written
    assert says in written
    assert "1 row left out" in written
    assert "Fix or remove these rows" in written
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [b'{"prompt": "a"}', gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-9], gzip.compress(b"{}")[:15] + b"\xff" * 9],
    ids=["plain text", "cut", "broken"],
)
def test_a_gzip_file_that_is_none(
    content: bytes, refused_in: RefusedIn, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    file = tmp_path / "own.jsonl.gz"
    file.write_bytes(content)
    recipe = write_recipe(data={"source": "jsonl", "path": str(file)}, reward=None)
    says = ("is not a complete gzip file", str(file), "Get the file again")
    refused_in(says, "run", recipe, "--out", tmp_path / "out")


def test_a_run_says_which_rows_it_leaves_out(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [{"prompt": user(f"{n}"), "completion": "Yes.", "label": n % 2} for n in range(20)]
    bad = {"prompt": [{"role": "[/red]", "content": "a"}]}
    write_rows(tmp_path / "own.jsonl", [*rows, bad])
    recipe = write_recipe(data={"source": "jsonl", "path": "own.jsonl", "held_out": 0.3}, rl=None)
    status, written = run_cli("run", recipe, "--out", tmp_path / "out")
    assert status == 0, written
    assert "1 row left out" in written
    assert "own.jsonl:21: " in written
    assert "unknown role '[/red]'" in written


TASKMASTER = {
    "no folder": (None, "there is no folder TM-4-2024/reward"),
    "truncated JSON": (b'[{"context": "[', "not JSON"),
    "no list": (b"{}", "the file is an object; a list expected"),
    "wrong encoding": ('["é"]'.encode("latin-1"), "can't decode byte 0xe9"),
    "a NaN reward": (b'[{"context": "[]", "generation": "{}", "reward": NaN}]', "NaN is not JSON"),
    "no rated turn": (b'[{"context": "[]"}]', "the row has no generation, reward"),
}


@pytest.mark.parametrize(("content", "says"), TASKMASTER.values(), ids=TASKMASTER)
def test_taskmaster_files_that_cannot_be_used(
    content: bytes | None, says: str, refused_in: RefusedIn, tmp_path: Path
) -> None:
    folder = tmp_path / "TM-4-2024"
    (folder / "data").mkdir(parents=True)
    if content is not None:
        (folder / "reward").mkdir()
        (folder / "reward" / "reward_00.json").write_bytes(content)
    refused_in((says, str(tmp_path), "data.path"), "data", "check", f"taskmaster-coffee:{tmp_path}")


@pytest.mark.parametrize("case", CASES, ids=named)
def test_one_message_and_nothing_lost(case: Case, refused: Refused) -> None:
    refused(case)
