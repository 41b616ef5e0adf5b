"""`init`: from a user's file to a recipe, and with it to a verdict and a policy."""

import csv
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from perl.recipe import load_recipe
from tests.conftest import DRINKS, RunCli, write_rows

README = Path(__file__).parents[2] / "README.md"
SHORT = (
    "base.dtype=float32",
    "rl.steps=1",
    "rl.max_new_tokens=2",
    "rl.eval_prompts=12",
    "rl.eval_samples=1",
    "rl.best_of_n=0",
    "rl.anyway=true",
)


def thumbs(file: Path) -> Path:
    """Write a CSV as users have it: with other column names and ratings in words."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["question", "response", "rating"])
        for order in (f"A {size} {drink}, please." for drink in DRINKS for size in ("small", "large", *"123")):
            writer.writerow([order, f"Here it is: {order}", "good"])
            writer.writerow([order, "No.", "bad"])
    return file


def test_the_readmes_first_run_on_ones_own_data(
    run_cli: RunCli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's lines unchanged, on a tiny base with one RL step: a verdict after two, a policy after three."""
    monkeypatch.setattr("perl.commands.init.print_prediction", lambda recipe: None)  # see below
    monkeypatch.chdir(tmp_path)
    thumbs(tmp_path / "thumbs.csv")
    section = README.read_text(encoding="utf-8").split("## Your first run on your own data")[1]
    lines = [shlex.split(line, comments=True)[1:] for line in section.split("```")[1].strip().splitlines()]
    commands = [line[0] for line in lines]
    assert commands == ["init", "reward", "rl", "run", "compare-runs"]
    assert commands.index("reward") + 1 <= 4, "to the verdict, without an edit"
    assert commands.index("rl") - commands.index("reward") <= 3, "from there to the policy"
    said = {}
    for line in lines:
        words = [str(tiny_llama) if word.startswith("Qwen/") else word for word in line]
        status, written = run_cli(*words, *(SHORT if line[0] in ("reward", "rl", "run") else ()))
        assert status == 0, written
        said[line[0]] = written
    assert "100 rated answers." in said["init"]
    assert "perl-rlhf reward mine.yaml" in said["init"]
    assert "it for RL" in said["reward"]
    assert set(json.loads(Path("runs/mine/report.json").read_text())["stages"]) == {"reward", "rl"}
    assert "reward: taken" in said["run"] or "taken from runs/mine" in said["run"], said["run"]
    assert "rl.kl_coef" in said["compare-runs"]


@pytest.mark.slow  # test_run.py runs all stages of one file, and the test below writes the recipe for it
def test_the_whole_recipe_on_ones_own_data(
    run_cli: RunCli, tiny_llama: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demonstrations and thumbs in one file: two commands without edits give a policy and its report."""
    monkeypatch.setattr("perl.commands.init.print_prediction", lambda recipe: None)
    monkeypatch.chdir(tmp_path)
    status, written = run_cli("init", "mine.yaml", "--data", mixed_data, "--base", tiny_llama)
    assert status == 0, written
    status, written = run_cli("run", "mine.yaml", *SHORT)
    assert status == 0, written
    report = json.loads(Path("runs/mine/report.json").read_text())["stages"]
    assert set(report) == {"sft", "reward", "rl"}
    low, high = report["sft"]["eval"]["loss_interval"]
    assert low < report["sft"]["eval"]["loss_after"] - report["sft"]["eval"]["loss_before"] < high


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
    assert ("placeholder" in text) == ("rl.reward is a placeholder" in written) == (stages == ["rl"])
    assert "  # A hub id or a folder" in text


def test_paths_are_written_as_seen_from_the_recipe(
    run_cli: RunCli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file of that name beside the recipe is not read instead."""
    monkeypatch.setattr("perl.commands.init.print_prediction", lambda recipe: None)
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("base").symlink_to(tiny_llama)
    write_rows(Path("rows.jsonl"), [DEMONSTRATION])
    write_rows(Path("sub/rows.jsonl"), [{"prompt": ASKED}])
    status, written = run_cli("init", "sub/mine.yaml", "--data", "rows.jsonl", "--base", "base")
    assert status == 0, written
    recipe = load_recipe(Path("sub/mine.yaml"))
    assert recipe.data.path == str(tmp_path / "rows.jsonl")
    assert recipe.base.model == str(tiny_llama)


@pytest.mark.parametrize(("extra", "told"), [({"helpful": "yes"}, True), ({}, False), ({"label": True}, False)])
def test_columns_that_no_stage_reads_are_named(
    extra: dict[str, Any], told: bool, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratings under an unknown name would make demonstrations of the answers that are rated down."""
    monkeypatch.setattr("perl.commands.init.print_prediction", lambda recipe: None)
    file = write_rows(tmp_path / "rows.jsonl", [DEMONSTRATION | extra])
    status, written = run_cli("init", tmp_path / "mine.yaml", "--data", file, "--yes")
    assert status == 0, written
    assert ("Only reward functions read helpful." in " ".join(written.split())) == told


def test_what_the_recipe_needs_is_shown(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": f"A {drink}, please."}] for drink in DRINKS]
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": one, "completion": "Yes."} for one in asked])
    status, written = run_cli("init", tmp_path / "mine.yaml", "--data", file, "--base", tiny_llama)
    assert status == 0, written
    assert re.search(r"sft\s*│update\s*│\s*[0-9.]+\s[MkG]B", written)


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
        ((), "--data is missing"),
        (("--data", "thumbs.csv"), "--base is missing"),
        (("--data", "coffee-simulator", "--yes"), "coffee-simulator is not a file"),
        (("--data", "gone.csv", "--yes"), "there is no such file"),
        (("--data", "latin.csv", "--yes"), "is not UTF-8"),
        (
            ("--data", "thumbs.csv", "--yes", "--columns", "label=thumb"),
            "data.columns names thumb, which no row has",
        ),
        (("--data", "thumbs.csv", "--base", "./gone"), "no such folder"),
    ],
)
def test_what_cannot_be_written(
    arguments: tuple[str, ...], says: str, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    thumbs(tmp_path / "thumbs.csv")
    (tmp_path / "latin.csv").write_bytes(b"prompt\ncaf\xe9\n")
    status, written = run_cli("init", *arguments)
    assert status == 2
    assert says in written
    assert not Path("recipe.yaml").exists()


def test_a_recipe_is_never_written_over(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    status, written = run_cli("init", tmp_path / "mine.yaml", "--yes")
    assert status == 2
    assert "exists already" in written
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(("times", "dtype"), [(7.2, "float32"), (0.4, "bfloat16")])
def test_a_cpu_that_is_slow_in_bfloat16_gets_a_recipe_in_float32(
    times: float, dtype: str, run_cli: RunCli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.commands.init.print_prediction", lambda recipe: None)
    monkeypatch.setattr("perl.system.device.slowdown", lambda dtype: times)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = tmp_path / "mine.yaml"
    status, written = run_cli("init", file, "--data", thumbs(tmp_path / "thumbs.csv"), "--base", tiny_llama)
    assert status == 0, written
    assert yaml.safe_load(file.read_text())["base"]["dtype"] == dtype
    assert ("bfloat16 about 7 times slower" in " ".join(written.split())) == (dtype == "float32")
