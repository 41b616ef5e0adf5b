"""Effects of alarms: a run stops at its last good state, continues, or is not watched, as its recipe says."""

import contextlib
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from perl.rl import loop
from perl.stages import reward, sft
from tests.conftest import LEAVES, RunCli, WriteRecipe

RL = {
    "steps": 30,
    "prompts_per_step": 8,
    "max_new_tokens": 8,
    "eval_prompts": 8,
    "eval_samples": 32,
    "missing_end_penalty": 0.0,
    "normalize_rewards": False,  # normalised, even an absurd reward makes a finite loss
    "kl_coef": 0.0,
    "kl_limit": 1.0,
    "learning_rate": 0.02,
    "reward": {"function": "rewards.py:length"},
}
ABSURD = """
import os
calls = 0

def absurd(completions, **columns):
    global calls
    calls += 1
    absurd = str(calls) in os.environ["ABSURD_AT"].split()
    return [1e29 if absurd and not index else float(len(str(text))) for index, text in enumerate(completions)]
"""


@pytest.fixture
def write_recipe(write_recipe: WriteRecipe, tiny_llama: Path, tmp_path: Path) -> WriteRecipe:
    """Return a writer of recipes on a base with logits large enough for a policy to move far from it."""
    folder = shutil.copytree(tiny_llama, tmp_path / "loud")
    config = LlamaConfig.from_pretrained(tiny_llama, initializer_range=0.2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return partial(write_recipe, base={"model": str(folder), "dtype": "float32"})


def run(run_cli: RunCli, recipe: Path, out: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    code, text = run_cli("run", recipe, *overrides, "--out", out)
    assert code == 0, text
    return json.loads((out / "report.json").read_text())["stages"]["rl"], text


def steps_of(out: Path, role: str = "policy") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / role / "metrics.jsonl").read_text().splitlines()]


def policy(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "policy" / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checkpointed(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Return a checkpoint's policy tensors by their names in the adapter."""
    state = load_file(out / "policy" / "checkpoints" / f"step-{step:08}" / "state.safetensors")
    found = {name.removeprefix("policy."): tensor for name, tensor in state.items() if name.startswith("policy.")}
    return {f"base_model.model.{name}": tensor for name, tensor in found.items()}


def test_a_run_that_goes_too_far_stops_and_its_last_good_policy_remains(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(reward=None, rl=RL, checkpoint_every=2)
    stage, text = run(run_cli, recipe, out)
    (incident,) = stage["incidents"]
    assert (incident["name"], incident["action"]) == ("kl", "stopped")
    lines = steps_of(out)
    assert len(lines) == incident["step"] < RL["steps"]
    assert lines[-1]["kl"] > RL["kl_limit"]
    remains = incident["remains"]
    assert remains == stage["eval"]["steps"] <= incident["good_until"] < incident["since"] <= incident["step"]
    assert remains % 2 == 0
    assert stage["eval"]["kl"] < RL["kl_limit"]
    assert same(policy(out), checkpointed(out, remains))
    assert f"RL was stopped at step {incident['step']}" in text
    assert f"policy after {remains} updates" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"RL was stopped at step {incident['step']}." in page
    assert (
        run_cli("run", recipe, "--out", out)[1].count("RL was stopped at step") == 1
    )  # reported again, not run again
    assert len(steps_of(out)) == len(lines)


def test_where_the_trouble_is_older_than_any_checkpoint_the_reference_remains(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    stage, _ = run(run_cli, write_recipe(reward=None, rl=RL, checkpoint_every=100), tmp_path / "out")
    assert stage["incidents"][0]["remains"] == 0
    assert stage["eval"]["kl"] == pytest.approx(0, abs=1e-4)
    assert stage["eval"]["reward_after"] == stage["eval"]["reward_before"]


def test_a_policy_that_moves_far_is_saved_between_the_regular_checkpoints(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """It is slower here than above, where the KL passes its limit within the five steps whose median is read."""
    rl = RL | {"learning_rate": 0.006, "kl_limit": 2.0}
    stage, _ = run(run_cli, write_recipe(reward=None, rl=rl, checkpoint_every=100), tmp_path / "out")
    (incident,) = stage["incidents"]
    assert incident["action"] == "stopped"
    assert 0 < incident["remains"] <= incident["good_until"] < 100
    assert rl["kl_limit"] / 32 < stage["eval"]["kl"] < rl["kl_limit"]


def test_a_run_that_only_warns_goes_on_and_one_that_is_not_watched_says_nothing(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(reward=None, rl=RL)
    found = {}
    for mode in ("warn", "off"):
        stage, text = run(run_cli, recipe, tmp_path / mode, f"rl.guard={mode}")
        found[mode] = [(incident["name"], incident["action"]) for incident in stage["incidents"]]
        assert ("away from its reference" in text) is (mode == "warn")
        assert stage["eval"]["steps"] == len(steps_of(tmp_path / mode)) == RL["steps"]
    assert found == {"warn": [("kl", "warned")], "off": []}
    assert same(policy(tmp_path / "warn"), policy(tmp_path / "off"))  # watching changes nothing
    assert [line["step"] for line in steps_of(tmp_path / "warn") if "held_out" in line] == []


def test_without_a_judge_held_out_prompts_are_tried_every_tenth_step(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, small_data: Path
) -> None:
    data = {"source": "jsonl", "path": str(small_data / "prompts.jsonl"), "held_out": 0.8}
    rl = RL | {"prompts_per_step": 2, "steps": 20, "guard": "warn"}
    run(run_cli, write_recipe(reward=None, rl=rl, data=data), tmp_path / "out")
    looked = [line for line in steps_of(tmp_path / "out") if "held_out" in line]
    assert [line["step"] for line in looked] == [10, 20]
    assert all(line["held_out"] > 0 and line["held_out_error"] > 0 for line in looked)


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_updates_that_are_not_finite_are_refused_and_the_third_in_a_row_stops(
    algorithm: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "absurd.py").write_text(ABSURD)
    monkeypatch.setenv("ABSURD_AT", "5 10 11 12")  # the first two calls are the evaluation before
    epochs = 2 if algorithm == "ppo" else 1
    rl = RL | {
        "kl_limit": 1e6,
        "algorithm": algorithm,
        "epochs": epochs,
        "reward": {"function": "absurd.py:absurd"},
    }
    stage, text = run(run_cli, write_recipe(reward=None, rl=rl, checkpoint_every=7), tmp_path / "out")
    assert [(one["step"], one["action"], one["grave"]) for one in stage["incidents"]] == [
        (3, "warned", False),
        (8, "warned", False),
        (10, "stopped", True),
    ]
    lines = steps_of(tmp_path / "out")
    assert [line["step"] for line in lines if line.get("refused")] == [3, 8, 9, 10]
    assert stage["incidents"][-1]["remains"] == 7  # nothing was updated since
    assert all(tensor.isfinite().all() for tensor in policy(tmp_path / "out").values())
    assert text.count("the update was refused") >= 3


def test_a_run_that_was_interrupted_stops_as_one_left_in_peace(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    rl = RL | {"reward": {"function": "leaves.py:leaves"}}
    recipe = write_recipe(reward=None, rl=rl, checkpoint_every=2)
    peaceful, _ = run(run_cli, recipe, tmp_path / "peaceful")
    when = peaceful["incidents"][0]["step"]
    monkeypatch.setenv("LEAVE_AT", str(when))  # the step before the alarm, as the evaluation before is one call
    assert run_cli("run", recipe, "--out", tmp_path / "interrupted")[0] == 130
    monkeypatch.delenv("LEAVE_AT")
    interrupted, _ = run(run_cli, recipe, tmp_path / "interrupted")
    assert interrupted["incidents"] == peaceful["incidents"]
    assert interrupted["eval"] == peaceful["eval"]
    assert same(policy(tmp_path / "interrupted"), policy(tmp_path / "peaceful"))


# The supervised stages.


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize(("wrong", "code"), [({3}, 0), ({3, 4, 5}, 1)])
def test_the_supervised_stages_refuse_too(
    stage: str,
    wrong: set[int],
    code: int,
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    mixed_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer: Any = sft.RoleTrainer if stage == "sft" else reward.RewardTrainer
    before, calls = trainer.compute_loss, 0

    def spoilt(self: Any, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += model.training
        loss = before(self, model, inputs, *arguments, **keywords)
        return loss * float("nan") if model.training and calls in wrong else loss

    monkeypatch.setattr(trainer, "compute_loss", spoilt)
    settings = {"epochs": 4, "batch_size": 4}
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    only = {"sft": None, "reward": None, "rl": None} | {stage: settings}
    found, text = run_cli("run", write_recipe(**only, data=data), "--out", tmp_path / "out")
    assert found == code, text
    assert text.count("the update was refused") == len(wrong)
    if code:
        assert "not finite in 3 consecutive steps, up to step 5" in text
        assert not (tmp_path / "out" / stage / "adapter").exists()
        return
    assert [line["step"] for line in steps_of(tmp_path / "out", stage) if line.get("refused")] == [3]
    weights = load_file(tmp_path / "out" / stage / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert "1 of" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("requested", [True, False])
def test_a_request_to_stop_in_the_step_of_an_alarm_stops_the_run(
    requested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run would go on with its evaluation; a resumed run has the same alarm."""
    monkeypatch.setattr(loop, "take_step", lambda *step: ({"reward": 0.0, "kl": 99.0}, {}))
    stop = SimpleNamespace(poll=lambda: requested, requested=requested)
    monkeypatch.setattr(loop, "between_steps", lambda processes: contextlib.nullcontext(stop))
    made_up: Any = SimpleNamespace(
        validation=None,
        steps=1,
        collector=SimpleNamespace(processes=None),
        guarding=SimpleNamespace(alarms=lambda step, metrics: ["alarm"]),
    )
    with pytest.raises(KeyboardInterrupt) if requested else contextlib.nullcontext():
        assert loop.train(made_up, cast(Any, None), 0, lambda *logged: None) == ["alarm"]
