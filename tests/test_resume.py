"""An interrupted run ends with the same bytes as an uninterrupted one."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from perl.rl.algorithms import ALGORITHMS
from tests import forks, killing
from tests.conftest import LEAVES, RunCli, WriteRecipe

SCHEDULE = {"lr_scheduler_type": "linear", "warmup_ratio": 0.5, "weight_decay": 0.1}
SFT = {"epochs": 4, "batch_size": 4, "learning_rate": 0.01, **SCHEDULE}
REWARD = {"loss": "thumbs", "epochs": 4, "batch_size": 4, "learning_rate": 0.01, **SCHEDULE}
RL = {"steps": 7, "prompts_per_step": 4, "micro_batch_size": 4, "max_new_tokens": 6, "eval_prompts": 2}


def learned(out: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(out)): file.read_bytes() for file in out.glob("*/adapter/*.safetensors")}
    assert found
    return found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The harness itself runs once per stage; `python -m tests.killing --count 20` is the long form."""
    done = forks.start(killing.main, "--count", "1", "--seed", "3", "--short", log=tmp_path / "log")
    assert done.wait(600) == 0, done.said()
    assert done.said().count("ended in the same bytes") == 3, done.said()


SELDOM = """

def seldom(completions, **columns):
    return [float(length % 4 == 0) for length in leaves(completions)]
"""
"""A reward with which many groups have equal rewards."""
REMEMBERS: dict[str, dict[str, Any]] = {
    "trpo": {"algorithm": "trpo", "critic": "adapter", "kl_target": 0.1},
    "kimi": {
        **{"algorithm": "kimi", "samples_per_prompt": 2, "prompt_sampling": "prioritised", "success_reward": 47.0},
        **{"length_reward": 0.5, "length_reward_delay": 0.3, "minibatches": 2},
    },
    "dapo": {
        **{"algorithm": "dapo", "samples_per_prompt": 2, "minibatches": 2, "kl": "loss-k2", "kl_target": 0.1},
        **{"prompt_sampling": "curriculum", "overlong_penalty": 0.5, "reward": {"function": "leaves.py:seldom"}},
    },
}
"""Recipes with state besides weights and optimizer: β, success rates, the measured order of a curriculum, the
scale of the rewards. None of their steps depends on the process's own generators."""


@pytest.mark.parametrize("name", REMEMBERS)
def test_sigterm_lets_the_step_end_saves_it_and_leaves_with_130(
    name: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = interrupted_and_resumed(REMEMBERS[name], run_cli, write_recipe, tmp_path, monkeypatch)
    assert name != "dapo" or any(step["redraws"] for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_goes_on_in_the_same_bytes(
    name: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_and_resumed({"algorithm": name}, run_cli, write_recipe, tmp_path, monkeypatch)


def interrupted_and_resumed(
    changes: dict[str, Any],
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[dict[str, Any]]:
    """Compare a run that was stopped and resumed with an uninterrupted one; return the metrics of its steps."""
    (tmp_path / "leaves.py").write_text(LEAVES + SELDOM)
    rl = RL | {"reward": {"function": "leaves.py:leaves"}, "best_of_n": 0} | changes
    recipe = str(write_recipe(rl=rl, reward=None, checkpoint_every=100))
    code, text = run_cli("run", recipe, "--out", str(tmp_path / "peaceful"))
    assert code == 0, text
    out = tmp_path / "interrupted"
    # There is one call before the steps (two if a curriculum is measured), one per step and one per redraw.
    monkeypatch.setenv("LEAVE_AT", "4")
    code, text = run_cli("run", recipe, "--out", str(out))
    assert code == 130
    assert "after this step" in text
    first, last = sorted(folder.name for folder in (out / "policy" / "checkpoints").iterdir())
    assert first == "step-00000000"
    assert last in ("step-00000001", "step-00000002", "step-00000003")
    assert not (out / "policy" / "adapter").exists()
    monkeypatch.delenv("LEAVE_AT")
    code, text = run_cli("run", recipe, "--out", str(out))
    assert code == 0, text
    assert learned(out) == learned(tmp_path / "peaceful")
    steps = [json.loads(line) for line in (out / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    results = [
        json.loads((folder / "policy" / "result.json").read_text()) for folder in (out, tmp_path / "peaceful")
    ]
    assert results[0]["eval"] == results[1]["eval"]
    return steps


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_supervised_stages_go_on_in_the_middle_of_an_epoch(
    tuning: str, run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    """All results after a checkpoint are lost, as in a power cut, and the stages compute them again."""
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    lora = {"rank": 2, "alpha": 4, "dropout": 0.2}
    recipe = write_recipe(data=data, sft=SFT, reward=REWARD, rl=None, lora=lora, tuning=tuning, checkpoint_every=3)
    out = tmp_path / "out"
    code, text = run_cli("run", str(recipe), "--out", str(out))
    assert code == 0, text
    files = {file: file.read_bytes() for file in out.glob("*/*/*.safetensors") if "checkpoints" not in str(file)}
    assert len(files) == 2
    for role in ("sft", "reward"):
        kept = sorted((out / role / "checkpoints").iterdir())
        for later in kept[1:]:
            later.rename(tmp_path / f"{role}-{later.name}")
        (out / role / "result.json").unlink()
    code, text = run_cli("run", str(recipe), "--out", str(out))
    assert code == 0, text
    for file, content in files.items():
        assert file.read_bytes() == content, file


def test_the_same_recipe_twice_gives_the_same_bytes(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    recipe = write_recipe(data=data, sft=SFT, reward=REWARD, rl=RL | {"reward": {}})
    for name in ("one", "two"):
        code, text = run_cli("run", str(recipe), "--out", str(tmp_path / name))
        assert code == 0, text
    assert len(learned(tmp_path / "one")) == 4
    assert learned(tmp_path / "one") == learned(tmp_path / "two")


def test_a_checkpoint_of_other_adapters_is_refused(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    recipe = str(write_recipe(rl=RL | {"reward": {"function": "rewards.py:length"}}, reward=None))
    out = tmp_path / "out"
    assert run_cli("run", recipe, "--out", str(out))[0] == 0
    (out / "policy" / "result.json").unlink()
    folder = max((out / "policy" / "checkpoints").iterdir())
    tensors = load_file(folder / "state.safetensors")
    name = next(name for name in tensors if name.startswith("policy."))
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "state.safetensors")
    code, text = run_cli("run", recipe, "--out", str(out))
    assert code == 2
    assert "damaged" in text
    values = json.loads((folder / "state.json").read_text())
    values["sha256"] = hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(values))
    code, text = run_cli("run", recipe, "--out", str(out))
    assert code == 2
    assert "has other adapters" in text
    assert os.path.isdir(folder)
    assert signal.getsignal(signal.SIGINT) is before
