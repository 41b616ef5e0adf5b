"""`init`: from one's own file to a recipe, and with it to a verdict and a policy."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import DRINKS, RunCli, write_rows


def thumbs(file: Path) -> Path:
    """A CSV as people have it: columns of other names, and ratings in words."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["question", "response", "rating"])
        for drink in DRINKS:
            writer.writerow([f"A {drink}, please.", f"One {drink}, of what size?", "good"])
            writer.writerow([f"A {drink}, please.", "No.", "bad"])
    return file


def test_from_a_csv_of_thumbs_to_a_verdict_and_a_policy(
    run_cli: RunCli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three commands and no edit of a file; all overrides but rl.anyway keep the test short."""
    monkeypatch.chdir(tmp_path)
    file = thumbs(tmp_path / "thumbs.csv")
    status, written = run_cli("init", "mine.yaml", "--data", file.name, "--base", tiny_llama, "--yes")
    assert status == 0, written
    assert "20 rated answers." in written
    assert "perl-rlhf reward mine.yaml" in written
    assert "generate" in written, "what RL will need"
    short = ("rl.steps=1", "rl.max_new_tokens=2")
    status, written = run_cli("reward", "mine.yaml", *short)
    assert status == 0, written
    assert "Not fit for RL" in written
    status, written = run_cli("rl", "mine.yaml", *short)
    assert status == 2, "the verdict is heeded"
    assert "rl.anyway=true" in written
    status, written = run_cli("rl", "mine.yaml", *short, "rl.anyway=true")
    assert status == 0, written
    assert set(json.loads(Path("runs/mine/report.json").read_text())["stages"]) == {"reward", "rl"}


ASKED = [{"role": "user", "content": "A latte, please."}]
DEMONSTRATION = {"prompt": ASKED, "completion": "One latte."}
PAIR = {"prompt": ASKED, "chosen": "One latte.", "rejected": "No."}


@pytest.mark.parametrize(
    ("rows", "stages", "loss"),
    [
        ([DEMONSTRATION], ["sft"], None),
        ([PAIR], ["reward", "rl"], "pairs"),
        ([DEMONSTRATION, PAIR, DEMONSTRATION | {"label": True}], ["sft", "reward", "rl"], "both"),
        ([{"prompt": ASKED}], ["rl"], None),
    ],
    ids=["demonstrations", "pairs", "all", "prompts"],
)
def test_the_stages_are_those_that_the_rows_allow(
    rows: list[dict[str, Any]],
    stages: list[str],
    loss: str | None,
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("perl.commands.init.print_prediction", lambda recipe: None)
    file, recipe = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "mine.yaml"
    status, written = run_cli("init", recipe, "--data", file, "--yes")
    assert status == 0, written
    text = recipe.read_text()
    content = yaml.safe_load(text)
    assert [stage for stage in ("sft", "reward", "rl") if stage in content] == stages
    assert content.get("reward", {}).get("loss") == loss
    assert ("stand-in" in text) == (stages == ["rl"])
    assert "  # A hub id or a folder" in text


def test_a_person_is_asked(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl.commands.init.print_prediction", lambda recipe: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{thumbs(tmp_path / 'thumbs.csv')}\n\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    status, written = run_cli("init", tmp_path / "mine.yaml")
    assert status == 0, written
    content = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert content["base"]["model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert content["data"]["columns"] == {"prompt": "question", "completion": "response", "label": "rating"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--data is not given"),
        (("--data", "thumbs.csv"), "--base is not given"),
        (("--data", "coffee-simulator", "--yes"), "coffee-simulator is no file"),
        (("--data", "gone.csv", "--yes"), "there is no such file"),
        (("--data", "thumbs.csv", "--base", "./gone"), "no such folder"),
    ],
)
def test_what_cannot_be_written(
    arguments: tuple[str, ...], says: str, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    thumbs(tmp_path / "thumbs.csv")
    status, written = run_cli("init", *arguments)
    assert status == 2
    assert says in written
    assert not Path("recipe.yaml").exists()


def test_a_recipe_is_never_written_over(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    status, written = run_cli("init", tmp_path / "mine.yaml", "--yes")
    assert status == 2
    assert "is there already" in written
    assert (tmp_path / "mine.yaml").read_text() == "mine"
