"""`generate` and `score`: one output line per input line, with the same values as the library."""

import json
import math
from pathlib import Path
from typing import Any

import pandas
import pytest

import perl
from tests.conftest import RunCli, write_rows
from tests.exported import make, recipe_on

CHAT = [{"role": "user", "content": "A latte, please."}]


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose roles have random weights."""
    return make(tmp_path_factory.mktemp("runs") / "out", recipe_on(tiny_llama, mixed_data))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_prompts_is_completed_and_then_scored(run_cli: RunCli, folder: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": CHAT}, {"prompt": CHAT, "completion": "No."}])
    drawn, scored = tmp_path / "drawn.jsonl", tmp_path / "scored.jsonl"
    status, written = run_cli("generate", folder, prompts, "--out", drawn, "--max-new-tokens", 8, "--seed", 5)
    assert status == 0, written
    loaded = perl.load_run(folder)
    texts = loaded.generate([CHAT, CHAT], "policy", max_new_tokens=8, seed=5)
    assert read(drawn) == [{"prompt": CHAT, "completion": text, "role": "policy"} for text in texts]
    status, written = run_cli("data", "check", drawn)
    assert status == 0, written

    status, written = run_cli("score", folder, drawn, "--out", scored)
    assert status == 0, written
    assert loaded.results.reward is not None
    fitted = loaded.results.reward.eval.calibration
    for line, text, expected in zip(read(scored), texts, loaded.score([CHAT, CHAT], texts), strict=True):
        chance = 1 / (1 + math.exp(-(fitted.slope * expected + fitted.intercept)))
        assert line == {
            **{"prompt": CHAT, "completion": text, "role": "policy"},
            **{"score": pytest.approx(expected), "probability": pytest.approx(chance)},
            "confidence": pytest.approx(max(chance, 1 - chance)),
        }


def test_empty_completions_are_said(
    run_cli: RunCli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.library.LoadedRun.complete", lambda *_: ["", "No."])
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": CHAT}] * 2)
    status, written = run_cli("generate", folder, "sft", prompts, "--out", tmp_path / "drawn.jsonl")
    assert status == 0, written
    assert "sft ended 1 completion immediately" in " ".join(written.split())
    assert [row["completion"] for row in read(tmp_path / "drawn.jsonl")] == ["", "No."]


def test_an_empty_completion_has_the_score_null_and_the_others_their_own(
    run_cli: RunCli, folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": CHAT, "completion": text, "label": True} for text in (" ", "No.", "")]
    nothing = {"score": None, "probability": None, "confidence": None}
    expected = perl.load_run(folder).score([CHAT], ["No."])[0]
    for some in (rows, rows[:1]):
        file, scored = write_rows(tmp_path / "rows.jsonl", some), tmp_path / "scored.jsonl"
        status, written = run_cli("score", folder, file, "--out", scored)
        assert status == 0, written
        assert "without text: score null" in " ".join(written.split())
        for line, row in zip(read(scored), some, strict=True):
            if row["completion"] == "No.":
                assert line["score"] == pytest.approx(expected)
            else:
                assert line == {**row, **nothing}
    status, written = run_cli("generate", folder, file, "--out", tmp_path / "drawn.jsonl", "--max-new-tokens", 2)
    assert status == 0, written


def test_a_conversation_is_scored_by_its_last_answer(run_cli: RunCli, folder: Path, tmp_path: Path) -> None:
    turns = [*CHAT, {"role": "assistant", "content": "What size?"}, {"role": "user", "content": "Large."}]
    answer = "One latte."
    file = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"messages": [*turns, {"role": "assistant", "content": answer}]},
            {"prompt": turns, "completion": answer},
        ],
    )
    status, written = run_cli("score", folder, file, "--out", tmp_path / "scored.jsonl")
    assert status == 0, written
    whole, apart = read(tmp_path / "scored.jsonl")
    assert whole["score"] == pytest.approx(apart["score"])
    assert whole["score"] == pytest.approx(perl.load_run(folder).score([turns], [answer])[0])


@pytest.mark.parametrize(
    ("command", "row", "what"),
    [
        ("score", {"prompt": "a"}, "rows.jsonl:2: the line has no completion to score"),
        ("score", {"prompt": 1}, "rows.jsonl:2: prompt is a number"),
        ("generate", {"prompt": ""}, "rows.jsonl:2: prompt is empty"),
        ("generate", [], "rows.jsonl:2: the row is a list"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_nothing_written(
    command: str, row: object, what: str, run_cli: RunCli, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": CHAT, "completion": "No."}, row])
    out = tmp_path / "out.jsonl"
    status, written = run_cli(command, tmp_path, file, "--out", out)
    assert (status, out.exists()) == (2, False)
    assert what in written


def test_the_help_of_generate_says_that_only_the_role_may_be_left_out(run_cli: RunCli, tmp_path: Path) -> None:
    status, written = run_cli("generate", "--help")
    assert status == 0, written
    assert [line.split()[0] for line in written.splitlines() if line.endswith("[required]")] == ["RUN", "FILE"]
    status, written = run_cli("generate", tmp_path, "sft", "policy", tmp_path / "prompts.jsonl")
    assert status == 2
    assert "2 roles are given: sft, policy" in written


def test_rows_of_every_form_are_read(run_cli: RunCli, folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": CHAT, "completion": text, "label": 1.0} for text in ("No.", "Yes, of course.")]
    table = pandas.DataFrame({**row, "prompt": json.dumps(row["prompt"])} for row in rows)
    table.to_csv(tmp_path / "rows.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    write_rows(tmp_path / "rows.jsonl", rows)
    scored = []
    for form in ("jsonl", "json", "csv", "parquet"):
        status, written = run_cli("score", folder, tmp_path / f"rows.{form}", "--out", tmp_path / "scored.jsonl")
        assert status == 0, written
        scored.append(read(tmp_path / "scored.jsonl"))
    assert scored[0][0].items() > rows[0].items()
    assert scored == [scored[0]] * 4


def test_what_is_no_file_is_an_error(run_cli: RunCli, folder: Path, tmp_path: Path) -> None:
    assert run_cli("score", folder, tmp_path / "none.jsonl")[0] == 2
    (tmp_path / "empty.jsonl").touch()
    status, written = run_cli("generate", folder, tmp_path / "empty.jsonl")
    assert status == 2
    assert "it is empty" in written
    status, written = run_cli("score", folder, tmp_path / "table.xlsx")
    assert status == 2
    assert ".xlsx files are not supported" in written
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": CHAT}])
    status, written = run_cli("generate", folder, "critic", file)
    assert status == 2
    assert "no role 'critic' that generates" in written
