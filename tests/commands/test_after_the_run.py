"""Trained roles stay usable: after their reward's file has changed, in `chat`, and after a failed start."""

import io
from pathlib import Path

import pytest

from tests.conftest import RunCli, WriteRecipe, write_rows

RL = {
    "reward": {"function": "rewards.py:length"},
    "steps": 2,
    "prompts_per_step": 2,
    "max_new_tokens": 4,
    "eval_prompts": 2,
}


def test_a_finished_policy_is_of_use_after_the_reward_has_changed(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(reward=None, rl=RL)
    assert run_cli("run", recipe, "--out", out)[0] == 0
    (tmp_path / "rewards.py").write_text(
        "def another(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "A tea."}]}])
    status, text = run_cli("generate", out, prompts, "--out", tmp_path / "texts.jsonl")
    assert status == 0, text
    status, text = run_cli("export", out, "policy", tmp_path / "exported")
    assert status == 0, text
    status, text = run_cli("run", recipe, "--out", out)  # to continue training is refused
    assert status == 2, text
    assert "has changed" in text or "has no" in text


def test_chat_fits_into_a_short_context(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain text is completed unchanged."""
    prompts = write_rows(tmp_path / "plain.jsonl", [{"prompt": f"Tea {number}"} for number in range(8)])
    out, data = tmp_path / "out", {"source": "jsonl", "path": str(prompts), "held_out": 0.3}
    status, text = run_cli("run", write_recipe(data=data, reward=None, rl=RL), "--out", out)
    assert status == 0, text
    monkeypatch.setattr("sys.stdin", io.StringIO("Tea 1\nTea 2\n\n"))
    monkeypatch.setattr("perl.library.LoadedRun._check", lambda *_: None)
    status, text = run_cli("chat", out)
    assert status == 0, text
    assert "each line is completed separately" in " ".join(text.split())


def test_a_guard_may_stop_rl_before_the_first_validation(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    rl = {**RL, "steps": 40, "eval_steps": 35, "kl_limit": 1e-4, "learning_rate": 0.05, "validation_share": 0.3}
    status, text = run_cli("run", write_recipe(reward=None, rl=rl), "--out", tmp_path / "out")
    assert status == 0, text
    assert "stopped" in text
    assert (tmp_path / "out" / "policy" / "adapter").is_dir()


def test_a_recipe_that_trained_nothing_may_be_corrected(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(reward=None, rl={**RL, "reward": {"function": "rewards.py:broken"}})
    with (tmp_path / "rewards.py").open("a") as file:
        file.write("def broken(completions, **columns):\n    return [None] * len(completions)\n")
    assert run_cli("run", recipe, "--out", tmp_path / "out")[0] == 2
    status, text = run_cli(
        "run", recipe, "seed=1", "lora.rank=1", "rl.reward.function=rewards.py:length", "--out", tmp_path / "out"
    )
    assert status == 0, text
