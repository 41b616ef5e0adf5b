"""Run folders are read whole, what is optional may be missing, and what is broken is named."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl.errors import UserError
from perl.page.runs import read_run, read_runs
from tests.page.made import make_report, make_run, write


def test_rich_run(tmp_path: Path) -> None:
    """Every key comes through."""
    run = read_run(make_run(tmp_path / "a"))
    rl, reward = run.report.stages.rl, run.report.stages.reward
    assert rl is not None
    assert reward is not None
    assert rl.eval.gold_before == 0.53
    assert rl.memory is not None
    assert rl.memory["update"].peak == pytest.approx(sum(rl.memory["update"].kinds.values()))
    assert reward.eval.intervals == {"auroc": (0.88, 0.92), "accuracy": (0.82, 0.87), "ece": None}
    assert len(run.metrics["policy"]["reward"]) == 60
    assert run.samples[0].answers["policy"].gold == 1
    assert run.recipe["seed"] == 0
    assert list(run.stages) == ["sft", "reward", "rl"]


def test_nulls_in_metrics_are_nan(tmp_path: Path) -> None:
    """A step without a value keeps its place."""
    norms = read_run(make_run(tmp_path / "a")).metrics["policy"]["grad_norm"]
    assert np.flatnonzero(np.isnan(norms)).tolist() == [2]


@pytest.mark.parametrize("kept", [[], ["sft"], ["reward"], ["rl"]])
def test_report_alone(tmp_path: Path, kept: list[str]) -> None:
    """Only report.json, only some stages, and the AUROC null."""
    report = make_report(random.Random(0), 0, "lora", 8)
    report["stages"]["reward"]["eval"]["auroc"] = None
    report["stages"] = {name: stage for name, stage in report["stages"].items() if name in kept}
    run = read_run(write(tmp_path / "a", report))
    assert list(run.stages) == kept
    assert run.samples == []
    assert run.metrics == {"sft": {}, "reward": {}, "policy": {}}
    assert run.recipe == {}


def test_no_runs() -> None:
    """None given."""
    with pytest.raises(UserError, match="no runs given"):
        read_runs([])


def test_unfinished(tmp_path: Path) -> None:
    """A folder without report.json."""
    with pytest.raises(UserError, match="not a finished run"):
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
