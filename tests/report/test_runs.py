"""Run folders are read completely; optional parts may be missing, and broken ones are named."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl.errors import UserError
from perl.report.runs import groups, read_run, read_runs
from tests.report.made import make_report, make_run, write


def test_rich_run(tmp_path: Path) -> None:
    """Every key is read."""
    run = read_run(make_run(tmp_path / "a"))
    rl, reward = run.report.stages.rl, run.report.stages.reward
    assert rl is not None
    assert reward is not None
    assert rl.eval.gold_before == 0.53
    assert rl.memory["update"].peak == pytest.approx(sum(rl.memory["update"].kinds.values()))
    assert reward.eval.intervals == {"auroc": (0.88, 0.92), "accuracy": (0.82, 0.87), "auroc_labels": None}
    assert len(run.metrics["policy"]["reward"]) == 60
    assert run.samples[0].answers["policy"].gold == 1
    assert run.recipe["seed"] == 0
    assert list(run.stages) == ["sft", "reward", "rl"]


def test_nulls_in_metrics_are_nan(tmp_path: Path) -> None:
    """A step without a value stays in the curve."""
    norms = read_run(make_run(tmp_path / "a")).metrics["policy"]["grad_norm"]
    assert np.flatnonzero(np.isnan(norms)).tolist() == [2]


@pytest.mark.parametrize("kept", [[], ["sft"], ["reward"], ["rl"]])
def test_report_alone(tmp_path: Path, kept: list[str]) -> None:
    """Only report.json with some stages, and a null AUROC, as for a model of one class."""
    report = make_report(random.Random(0), 0, "lora", 8)
    report["stages"]["reward"]["eval"]["auroc"] = None
    report["stages"] = {name: stage for name, stage in report["stages"].items() if name in kept}
    run = read_run(write(tmp_path / "a", report))
    assert list(run.stages) == kept
    assert run.samples == []
    assert not any(run.metrics.values())
    assert run.recipe == {}


def test_unknown_keys_are_passed_over(tmp_path: Path) -> None:
    """Files of a newer version can be read."""
    report = make_report(random.Random(0), 0, "lora", 8)
    report["more"] = report["stages"]["rl"]["eval"]["more"] = report["stages"]["rl"]["memory"]["load"]["more"] = 1
    assert read_run(write(tmp_path / "a", report)).stages.keys() == {"sft", "reward", "rl"}


def test_no_runs() -> None:
    """None given."""
    with pytest.raises(UserError, match="no runs given"):
        read_runs([])


def test_unfinished(tmp_path: Path) -> None:
    """A folder without report.json."""
    with pytest.raises(UserError, match="not a run"):
        read_run(tmp_path)


def _break(report: dict[str, Any]) -> dict[str, Any]:
    del report["stages"]["rl"]["eval"]["kl"]
    return report


def test_key_missing(tmp_path: Path) -> None:
    """The key is named."""
    folder = write(tmp_path / "a", _break(make_report(random.Random(0), 0, "lora", 8)))
    with pytest.raises(UserError, match=r"report\.json: stages\.rl\.eval\.kl: Field required"):
        read_run(folder)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("report.json", "{", r"report\.json: not JSON"),
        ("report.json", "[]", r"report\.json: the value"),
        ("policy/metrics.jsonl", '{"step": 1}\n{"st', r"metrics\.jsonl, line 2: not JSON"),
        ("policy/samples.jsonl", json.dumps({"prompt": 3, "answers": {}}), r"samples\.jsonl, line 1: prompt"),
        ("recipe.yaml", b"\xff\xfe\xff", r"recipe\.yaml: cannot be read"),
    ],
)
def test_broken_files(tmp_path: Path, file: str, text: str | bytes, said: str) -> None:
    """The file and line are named."""
    folder = make_run(tmp_path / "a")
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        read_run(folder)


def test_runs_of_different_recipes_are_not_pooled(tmp_path: Path) -> None:
    """Two models with one seed are not two seeds of one model; another base is not the other tuning."""
    one = make_run(tmp_path / "one", rich=False)
    more = make_run(tmp_path / "more", 1, steps=61, rich=False)
    with pytest.raises(UserError, match=r"different recipes, which differ in rl\.steps"):
        groups(read_runs([one, more]))
    with pytest.raises(UserError, match="both have seed 0"):
        groups(read_runs([one, make_run(tmp_path / "again", rich=False)]))
    full = make_run(tmp_path / "full", tuning="full", rich=False)
    assert [group.tuning for group in groups(read_runs([full, one]))] == ["lora", "full"]
    recipe = (full / "recipe.yaml").read_text()
    (full / "recipe.yaml").write_text(recipe.replace("Qwen2.5-0.5B", "Qwen2.5-1.5B"))
    with pytest.raises(UserError, match=r"differ in base\.model"):
        groups(read_runs([full, one]))


def test_without_their_recipes_models_are_told_apart_by_the_report(tmp_path: Path) -> None:
    reports = [make_report(random.Random(0), seed, "lora", 8) for seed in (0, 1)]
    reports[1]["base"]["model"] = "another/model"
    runs = [write(tmp_path / str(place), report) for place, report in enumerate(reports)]
    with pytest.raises(UserError, match=r"differ in base\.model"):
        groups(read_runs(runs))
