"""Best instead of last weights: validation rows, early stopping, and the weights that a stage keeps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perl.runs.validation import Validation
from tests.conftest import DRINKS, RunCli, WriteRecipe, write_rows

WEIGHTS = "adapter_model.safetensors"


def test_the_best_step_and_the_end_of_patience_by_hand() -> None:
    loss = Validation(every=2, patience=2, by="loss", rows=3, sign=-1)
    assert [loss.due(step, 5) for step in range(1, 6)] == [False, True, False, True, True]
    found = []
    for step, value in ((2, 0.5), (4, 0.4), (6, float("nan")), (8, 0.4), (10, 0.3)):
        loss.values[step] = value
        found.append((loss.best(), loss.exhausted))
    assert found == [(2, False), (4, False), (4, False), (4, True), (10, False)]
    assert loss.best(until=9) == 4
    reward = Validation(every=1, patience=None, by="reward", rows=3, sign=1, values={1: 0.5, 2: 0.7, 3: 0.6})
    assert (reward.best(), reward.exhausted) == (2, False)
    # A run of more steps has no validation where a shorter one ended.
    state = {"values": [(2, 0.5), (4, 0.4), (5, 0.1)], "unit": None}
    for steps, expected in ((5, 5), (8, 4)):
        loss.load_state_dict(state, steps)
        assert loss.best() == expected


def stage_of(out: Path, role: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / role / "result.json").read_text())
    return result


def metrics_of(out: Path, role: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / role / "metrics.jsonl").read_text().splitlines()]


def test_supervised_stages_keep_the_best_weights_and_stop_early(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    schedule = {
        "epochs": 30,
        "batch_size": 4,
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "validation_share": 0.3,
    }
    recipe = write_recipe(
        seed=1,
        checkpoint_every=3,
        lora={"rank": 2, "alpha": 4, "dropout": 0.1},
        data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3},
        sft={**schedule, "learning_rate": 0.05, "weight_decay": 0.01},
        reward={**schedule, "learning_rate": 0.05, "members": 2},
        rl=None,
    )
    out = tmp_path / "out"
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    for role in ("sft", "reward"):
        stage, metrics = stage_of(out, role), metrics_of(out, role)
        kept = stage["kept"][0]
        values = {int(step): value for step, value in kept["values"]}
        assert values == {one["step"]: one["validation_loss"] for one in metrics if "validation_loss" in one}
        assert kept["step"] == min(values, key=lambda step: (values[step], step))
        assert kept["taken"] == len(metrics) < kept["steps"], "it stopped early"
        assert f"The kept weights are those of step {kept['step']} of" in " ".join(text.split())
        # The saved weights are those of the best step's checkpoint.
        state = load_file(out / role / "checkpoints" / f"step-{kept['step']:08}" / "state.safetensors")
        saved = load_file(out / role / "adapter" / WEIGHTS)
        name = next(name for name in saved if "lora_B" in name)
        assert torch.equal(saved[name], state[f"{role}.{name.removeprefix('base_model.model.')}"])
    assert len(stage_of(out, "reward")["kept"]) == 2

    # Interrupted after its best step, a stage ends in the same bytes.
    written = {role: (out / role / "adapter" / WEIGHTS).read_bytes() for role in ("sft", "reward")}
    for role in ("sft", "reward"):
        best = stage_of(out, role)["kept"][0]["step"]
        for folder in (out / role / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step-")) > best:
                shutil.rmtree(folder)
        (out / role / "result.json").unlink()
        shutil.rmtree(out / role / "adapter")
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    assert {role: (out / role / "adapter" / WEIGHTS).read_bytes() for role in ("sft", "reward")} == written


def test_validation_rows_are_of_other_dialogues_and_too_few_are_refused(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"A {drink}."}], "completion": text, "label": label}
        for drink in DRINKS[:2]
        for text, label in ((f"One {drink}.", True), ("No.", False))
    ]
    own = write_rows(tmp_path / "few.jsonl", rows)
    data = {"source": "jsonl", "path": str(own), "held_out": 0.5}
    code, text = run_cli("run", write_recipe(data=data, reward={"eval_steps": 1}, rl=None))
    assert code == 2
    assert "too few dialogues to use a part for validation" in " ".join(text.split())


def test_rows_that_both_sides_have_are_left_out_and_the_rest_validates(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Every second dialogue has greetings, as in real data, which used to be refused as too few dialogues."""
    rows = []
    for number, drink in enumerate(DRINKS):
        asked = [{"role": "user", "content": f"A {drink}, please."}]
        rows += [
            {"dialogue": str(number), "prompt": asked, "completion": f"One {drink}.", "label": True},
            {"dialogue": str(number), "prompt": asked, "completion": "No.", "label": False},
        ]
        if number % 2:
            greeted = [{"role": "user", "content": "Good morning to all of you!"}]
            rows.append(
                {"dialogue": str(number), "prompt": greeted, "completion": "Good morning to you.", "label": True}
            )
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "greeted.jsonl", rows)), "held_out": 0.2}
    reward = {"eval_steps": 2, "validation_share": 0.4, "batch_size": 4}
    code, text = run_cli("run", write_recipe(data=data, reward=reward, rl=None), "--out", tmp_path / "out")
    assert code == 0, text
    assert stage_of(tmp_path / "out", "reward")["kept"][0]["rows"] < len(rows) * 0.4


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"reward": {"early_stopping_patience": 2}},
            "early_stopping_patience counts validations, and there are none",
        ),
        ({"rl": {"eval_reward": "gold"}}, "eval_reward is used at every eval_steps, but there are none"),
        ({"rl": {"eval_reward": "gold", "eval_steps": 1}}, "has no gold judge"),
        ({"rl": {"eval_reward": {"kind": "nonsense"}, "eval_steps": 1}}, "no kind of reward 'nonsense'"),
        (
            {"rl": {"reward": {}, "eval_reward": {"kind": "model"}, "eval_steps": 1}},
            "rl.eval_reward would choose by what rl.reward trains on (member 1)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    section: dict[str, Any], message: str, run_cli: RunCli, write_recipe: WriteRecipe
) -> None:
    code, text = run_cli("run", write_recipe(**section))
    assert (code, message in " ".join(text.split())) == (2, True), text


@pytest.mark.parametrize(
    "judge", [None, pytest.param({"kind": "length"}, marks=pytest.mark.slow), {"kind": "model", "members": [2]}]
)
def test_rl_keeps_the_policy_that_validation_prefers(
    judge: dict[str, Any] | None, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    rl: dict[str, Any] = {
        "steps": 6,
        "prompts_per_step": 2,
        "max_new_tokens": 4,
        "eval_prompts": 2,
        "eval_samples": 2,
        "learning_rate": 0.02,
        "eval_steps": 1,
        "early_stopping_patience": 3,
        "validation_share": 0.3,
        "weight_decay": 0.1,
    }
    if judge is not None:
        rl |= {"eval_reward": judge, "reward": {"kind": "model", "members": [1]}}
    else:
        rl |= {"reward": {"function": "rewards.py:length"}}
    reward = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "members": 2}
    recipe = write_recipe(checkpoint_every=2, reward=reward if judge else None, rl=rl)
    out = tmp_path / "out"
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    stage, metrics = stage_of(out, "policy"), metrics_of(out, "policy")
    values = {one["step"]: one["validation"] for one in metrics}
    (kept,) = stage["kept"]
    assert kept["step"] == stage["eval"]["steps"] == max(values, key=lambda step: (values[step], -step))
    assert {int(step): value for step, value in kept["values"]} == values
    state = load_file(out / "policy" / "checkpoints" / f"step-{kept['step']:08}" / "state.safetensors")
    saved = load_file(out / "policy" / "adapter" / WEIGHTS)
    name = next(name for name in saved if "lora_B" in name)
    assert torch.equal(saved[name], state[f"policy.{name.removeprefix('base_model.model.')}"])
