"""The grid: a cell from plan to metrics, verdicts on metrics, and agreement between scales."""

import json
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.grid import judge, prompts
from benchmarks.grid.__main__ import _finished
from benchmarks.grid.cell import Plan, run_cell
from benchmarks.grid.facts import Facts
from benchmarks.grid.table import scale_row, write_tables
from benchmarks.grid.verdict import collapsed, verdict
from tests.conftest import write_rows

FACTS = Facts("box", 0.05, 40, 66.0, 1, 0.5)
SMALL = ["base.dtype=float32", "lora.rank=2", "rl.prompts_per_step=2", "rl.eval_prompts=2"]


@pytest.fixture(autouse=True)
def _few_prompts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(prompts, "TRAINING", 10)
    monkeypatch.setattr(prompts, "JUDGED", 3)
    found = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, found)


def plan(base: Path, model: str, reward: str, **changes: Any) -> Plan:
    settings = {
        "scale": "100",
        "algorithm": "default",
        "seed": 0,
        "steps": 2,
        "max_new_tokens": 4,
        "overrides": SMALL,
        "ratings": "",
        "facts": asdict(FACTS),
    }
    return Plan(model=model, reward=reward, base=str(base), **settings | changes)


def ended(low: float, high: float, **metrics: Any) -> dict[str, Any]:
    """Return a cell that ended with this interval."""
    same = {f"{name}_{when}": 1.0 for name in ("reward", "tokens", "distinct") for when in ("before", "after")}
    place = {"model": "gpt2", "reward": "dense", "scale": "1", "algorithm": "default", "seed": 0}
    return {**place, "exit": 0, "kl": 1.0, "seconds": 1.0, "interval": [low, high], **same, **metrics}


def test_a_cell_trains_and_is_judged(tiny_gpt2: Path, tmp_path: Path) -> None:
    plan(tiny_gpt2, "gpt2", "length").write(tmp_path)
    result = run_cell(tmp_path)
    assert result["exit"] == 0
    assert result == json.loads((tmp_path / "cell.json").read_text())
    assert len((tmp_path / "run" / "policy" / "metrics.jsonl").read_text().splitlines()) == 2
    # The run's own rewards are in hundreds, the judge's are raw: 0 at best, -1 for nothing.
    assert result["run"]["reward_after"] < -50
    assert -1 < result["reward_after"] < 0
    assert len(result["rewards_after"]) == 3
    low, high = result["interval"]
    assert low <= result["reward_after"] - result["reward_before"] <= high


def test_a_reward_model_is_scaled_in_its_stamp(tiny_llama: Path, tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts.training("chat")]
    ratings = write_rows(
        tmp_path / "ratings.jsonl",
        [
            {"prompt": one, "completion": text, "label": text == "Fun."}
            for one in asked
            for text in ("Fun.", "No.")
        ],
    )
    overrides = [*SMALL, "reward.epochs=1", "reward.batch_size=8"]
    stds, rewards = [], []
    for scale in ("1", "100"):
        folder = tmp_path / scale
        folder.mkdir()
        plan(tiny_llama, "qwen3", "model", scale=scale, ratings=str(ratings), overrides=overrides).write(folder)
        result = run_cell(folder)
        stds.append(json.loads((folder / "run" / "reward" / "adapter" / "perl.json").read_text())["reward_std"])
        rewards.append(result["reward_before"])
        assert 0 <= result["gold_after"] <= 1
    assert stds[1] == pytest.approx(stds[0] / 100)
    assert 0 < rewards[0] == rewards[1] < 1


@pytest.mark.parametrize(("low", "high", "word"), [(0.1, 0.3, "up"), (-0.1, 0.3, "flat"), (-0.3, -0.1, "down")])
def test_verdict_follows_the_interval(low: float, high: float, word: str) -> None:
    assert verdict(ended(low, high)) == word
    assert collapsed(ended(low, high)) == (word == "down")


def test_shrinking_is_collapse_only_where_nothing_was_gained() -> None:
    assert collapsed(ended(-0.1, 0.1, tokens_after=0.4))
    assert not collapsed(ended(0.1, 0.3, tokens_after=0.4))


@pytest.mark.parametrize(
    ("rewards", "word"),
    [([1.0, 2.0, 3.0], "to rounding"), ([1.0, 1.9, 3.2], "within noise"), ([1.5, 2.6, 3.5], "no")],
)
def test_scales_agree_to_rounding_within_noise_or_not(rewards: list[float], word: str) -> None:
    one = ended(0, 1, reward_after=2.0, rewards_after=[1.0, 2.0, 3.0])
    other = ended(0, 1, scale="100", reward_after=sum(rewards) / 3, rewards_after=rewards)
    assert scale_row([one, other])["agree"] == word


def test_the_interval_is_of_the_mean_change() -> None:
    assert judge.paired_interval([0.5] * 8) == [0.5, 0.5]
    low, high = judge.paired_interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.4, abs=0.03)
    assert high == pytest.approx(0.6, abs=0.03)


def test_a_cell_of_another_plan_is_not_taken_for_finished(tmp_path: Path) -> None:
    mine = plan(tmp_path, "gpt2", "dense")
    folder = tmp_path / "cells" / mine.name
    folder.mkdir(parents=True)
    assert _finished(mine, tmp_path) is None
    (folder / "cell.json").write_text(json.dumps({**asdict(mine), "exit": 0}))
    assert _finished(mine, tmp_path) == {**asdict(mine), "exit": 0}
    with pytest.raises(SystemExit, match="was run with steps 2, not 3"):
        _finished(plan(tmp_path, "gpt2", "dense", steps=3), tmp_path)


def test_tables_name_what_failed_and_what_collapsed_in_silence(tmp_path: Path) -> None:
    failed = {key: value for key, value in ended(0, 0, scale="100").items() if key != "interval"} | {"exit": 2}
    text = write_tables([ended(-0.3, -0.1), failed], tmp_path)
    assert "2 cells: 0 up, 0 flat, 1 down, 1 failed" in text
    assert "without an incident: 1: gpt2 dense 1 default 0." in text
    assert "failed (2)" in (tmp_path / "grid.md").read_text()
    assert len(json.loads((tmp_path / "grid.json").read_text())["cells"]) == 2
