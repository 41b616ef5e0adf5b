"""The math sets: rows in each published format, and the real files if they are next to the checkout."""

import json
from pathlib import Path

import pytest

from perl.data.leaks import find_leak
from perl.data.math_sets import MATH_SETS, read_math
from perl.data.records import Demonstration, Prompt, Records, Turn
from perl.data.sources import load_records
from perl.data.splits import split
from perl.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "math"
FOLDERS = {
    "gsm8k": REAL / "gsm8k",
    "aqua": REAL / "llm-adapters" / "AQuA",
    "addsub": REAL / "llm-adapters" / "AddSub",
    "multiarith": REAL / "llm-adapters" / "MultiArith",
    "singleeq": REAL / "llm-adapters" / "SingleEq",
    "svamp": REAL / "llm-adapters" / "SVAMP",
    "mawps": REAL / "llm-adapters" / "mawps",
}
# Rows as published, and solutions that come to their row's own answer by the rule; counted once with the sets' own
# code (evaluate.py of LLM-Adapters).
COUNTS = {
    "gsm8k": (8_792, 8_792),
    "aqua": (254, 109),
    "addsub": (395, 370),
    "multiarith": (600, 560),
    "singleeq": (508, 484),
    "svamp": (1_000, 803),
    "mawps": (1_898, 0),
}


@pytest.fixture(scope="module")
def real() -> dict[str, Records]:
    if not REAL.is_dir():
        pytest.skip("the published sets are not beside the checkout, in shared/math")
    return {name: read_math(MATH_SETS[name], folder) for name, folder in FOLDERS.items()}


def test_the_sets_count_as_published_and_wrong_solutions_are_listed(real: dict[str, Records]) -> None:
    for name, records in real.items():
        assert not records.problems, name
        assert (len(records.prompts), len(records.demonstrations)) == COUNTS[name], name
        rows, right = COUNTS[name]
        if name != "mawps" and right < rows:
            assert f"{rows - right:,} of {rows:,} rows have a solution whose answer is not" in records.notes[0]
            assert records.notes[0].count("[") == rows - right
    assert len(real["gsm8k"].published_test) == 1_319


@pytest.mark.parametrize(
    ("train", "test", "found", "questions"),
    [
        ("mawps", "addsub", 327, 395),
        ("mawps", "multiarith", 470, 580),
        ("mawps", "singleeq", 435, 507),
        ("addsub", "singleeq", 126, 507),
        *(("gsm8k", name, 0, None) for name in ("gsm8k", "aqua", "addsub", "multiarith", "singleeq", "svamp")),
    ],
)
def test_leaks_are_those_known(
    train: str, test: str, found: int, questions: int | None, real: dict[str, Records]
) -> None:
    leak = find_leak(real[train], real[test])
    assert len(leak.found) == found
    assert questions is None or leak.questions == questions


def test_gsm8k_loses_the_calculator_and_holds_its_test_part_out(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n} and 2?", "answer": f"It is <<{n}+2={n + 2}>>{n + 2}.\n#### {n + 2}"} for n in range(9)
    ]
    for name, part in (("train", rows[:6]), ("test", rows[5:])):  # row 5 is in both
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    records = load_records("gsm8k", str(tmp_path), 0)
    context = (Turn("user", "0 and 2?"),)
    assert records.prompts[0] == Prompt(context, "0 and 2?", {"answer": "2"})
    assert records.demonstrations[0] == Demonstration(context, (Turn("agent", "It is 2.\n#### 2"),), "0 and 2?")
    train, held_out = split(records, 0.5, seed=0)
    assert [len(side.prompts) for side in (train, held_out)] == [5, 4]


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    good = {"instruction": " 1 + 1? ", "input": "", "output": "A: It is 2.", "answer": "2.0"}
    rows = [good, good | {"answer": "two"}, {"instruction": "x"}, good | {"output": "It is 3."}]
    file = tmp_path / "test.json"
    file.write_text(json.dumps(rows))
    records = load_records("addsub", str(file), 0)
    assert [(one.where, one.what) for one in records.problems] == [
        ("test.json[1]", "the answer 'two' is not a number"),
        ("test.json[2]", "the row has no output, answer"),
    ]
    assert [one.context[0].text for one in records.prompts] == ["1 + 1?", "1 + 1?"]
    assert len(records.demonstrations) == 1
    assert records.notes[0].endswith(": [3]")


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("{}", "is not a list of rows")])
def test_a_file_without_rows_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(UserError, match=says):
        load_records("svamp", str(tmp_path), 0)
