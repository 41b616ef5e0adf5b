"""The RL stage: each algorithm learns with several seeds, and runs are reproducible to the byte."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perl.backbones.shared_prompts import SharedPrompts
from perl.recipe import load_recipe
from perl.roles.outputs import Outputs
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase
from perl.stages import rl, rl_setup
from tests.conftest import RunCli
from tests.tiny import random_llama

WORDS = [f"w{index}" for index in range(30)]
REWARD = """
import numpy as np

def contains(completions, **columns):
    return [float("w7" in text.split()) for text in completions]

def times_100(completions, **columns):
    return [100.0 * score for score in contains(completions)]

def percent(completions, **columns):
    return [score / 100.0 for score in contains(completions)]

def shifted(completions, **columns):
    return [1000.0 + score for score in contains(completions)]

def constant(completions, **columns):
    return [0.7 for text in completions]

calls = 0

def once(completions, **columns):
    global calls
    calls += 1
    return [float(calls == 5 and index == 0) for index, text in enumerate(completions)]  # after the evaluation

def absurd(completions, **columns):
    global calls
    calls += 1
    return [1e9 if calls == 7 and index == 0 else score for index, score in enumerate(contains(completions))]

def drawn(completions, **columns):
    return [float(np.random.random()) for text in completions]
"""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "reinforce": {"algorithm": "reinforce", "critic": "shared"},
    "reinforce, own critic": {"algorithm": "reinforce", "critic": "adapter"},
    "ppo": {"algorithm": "ppo", "critic": "shared", "epochs": 2},
    "ppo, own critic": {"algorithm": "ppo", "critic": "adapter", "epochs": 2},
    "rloo": {"algorithm": "rloo", "samples_per_prompt": 4, "prompts_per_step": 8},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama with 32 words, prompts, and a reward for completions that contain w7."""
    folder = tmp_path_factory.mktemp("toy")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder
    )
    with torch.random.fork_rng():
        random_llama(
            vocab_size=32,
            max_position_embeddings=64,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        ).save_pretrained(folder)
    rows = [{"prompt": f"w{a} w{b}"} for a in range(8) for b in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def recipe(toy: Path, file: Path, seed: int = 0, reward: str = "contains", **rl: Any) -> Path:
    settings = {
        "steps": 40,
        "prompts_per_step": 32,
        "micro_batch_size": 32,
        "max_new_tokens": 8,
        "learning_rate": 0.01,
        "kl_coef": 0.01,
        "missing_end_penalty": 0.0,
        "eval_prompts": 16,
    }
    content = {
        "name": "toy",
        "seed": seed,
        "base": {"model": str(toy), "dtype": "float32"},
        "data": {"source": "jsonl", "path": str(toy / "prompts.jsonl"), "held_out": 0.25},
        "rl": settings | rl | {"reward": {"function": f"{toy}/reward.py:{reward}"}},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def run(run_cli: RunCli, recipe_file: Path, out: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    code, text = run_cli("run", str(recipe_file), "--out", str(out))
    assert code == 0, text
    report = json.loads((out / "report.json").read_text())
    lines = (out / "policy" / "metrics.jsonl").read_text().splitlines()
    return report["stages"]["rl"]["eval"], [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=[] if seed == number % 3 else pytest.mark.slow)
        for number, name in enumerate(ALGORITHMS)
        for seed in range(3)
    ],
)
def test_each_algorithm_learns_to_say_a_word(
    name: str, seed: int, toy: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    metrics, steps = run(run_cli, recipe(toy, tmp_path / "r.yaml", seed, **ALGORITHMS[name]), tmp_path / "out")
    first, last = steps[0], [step["reward"] for step in steps[-5:]]
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # the policy begins as the reference
    assert first["sampler_mismatch"] < 1e-5  # and its ratio to the sampler's begins as 1
    assert first["reward"] < 0.5
    assert sum(last) / 5 > max(0.8, first["reward"] + 0.35)
    assert metrics["kl"] > 0.1


def test_prompts_computed_once_for_their_completions_change_no_step(
    toy: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, shared, curves = Roles.forward, set[tuple[Role, bool]](), []

    def watched(
        roles: Roles, role: Role, *args: Any, prompts: SharedPrompts | None = None, **named: Any
    ) -> Outputs:
        if prompts is not None and roles.shares_prompts:
            shared.add((role, torch.is_grad_enabled()))
        return forward(roles, role, *args, prompts=prompts, **named)

    monkeypatch.setattr(Roles, "forward", watched)
    for reason in (None, "it is tried without"):
        monkeypatch.setattr(rl_setup, "unsupported_reason", lambda *_, reason=reason: reason)
        shared.clear()
        settings = ALGORITHMS["rloo"] | {"steps": 2, "micro_batch_size": 6}
        file, out = recipe(toy, tmp_path / "r.yaml", **settings), tmp_path / str(reason)
        code, text = run_cli("run", str(file), "--out", str(out))
        assert code == 0, text
        assert ("separately for each of their completions: it is tried without" in " ".join(text.split())) == bool(
            reason
        )
        assert ({(Role.BASE, False), (Role.POLICY, True)} <= shared) == (reason is None)
        lines = (out / "policy" / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    for one, other in zip(*curves, strict=True):
        for key in ("policy_loss", "grad_norm", "kl", "entropy"):
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5)


def test_the_first_pass_of_ppo_has_ratio_one(toy: Path, tmp_path: Path, run_cli: RunCli) -> None:
    settings = {"algorithm": "ppo", "steps": 3, "epochs": 1, "micro_batch_size": 5}
    _, steps = run(run_cli, recipe(toy, tmp_path / "r.yaml", **settings), tmp_path / "out")
    assert all(step["sampler_mismatch"] < 1e-5 for step in steps)


@pytest.mark.parametrize("name", ["ppo, own critic", "rloo"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    name: str, toy: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    weights = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = ALGORITHMS[name] | {"steps": 3}
        run(run_cli, recipe(toy, tmp_path / f"{place}.yaml", seed, **settings), tmp_path / place)
        weights.append((tmp_path / place / "policy" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize("name", ["ppo", "ppo, own critic"])
def test_micro_batches_and_checkpointing_change_no_step(
    name: str, toy: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """The micro-batches' gradients add up to the gradient of the whole rollout."""
    curves = []
    for size, checkpointing in ((32, "false"), (5, "false"), (32, "true")):
        out = tmp_path / f"{size}{checkpointing}"
        file = recipe(toy, tmp_path / "r.yaml", **ALGORITHMS[name], steps=3, micro_batch_size=size)
        code, text = run_cli("run", str(file), f"checkpoint_activations={checkpointing}", "--out", str(out))
        assert code == 0, text
        lines = (out / "policy" / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    for other in curves[1:]:
        for one, two in zip(curves[0], other, strict=True):
            assert two["policy_loss"] == pytest.approx(one["policy_loss"], abs=1e-4)
            assert two["value_loss"] == pytest.approx(one["value_loss"], rel=1e-3)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("name", ["ppo", "ppo, own critic"])
def test_the_lower_half_computed_once_changes_no_step(
    name: str, toy: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters on the upper half, the run ends with the adapters of one that always computes all blocks."""
    ends = []
    for place in ("once", "anew"):
        if place == "anew":
            monkeypatch.setattr(SharedBase, "shared_blocks", 0)
        # Where a gradient is nearly zero, Adam turns its rounding into part of a full step.
        settings = ALGORITHMS[name] | {"steps": 3, "learning_rate": 0.005, "head_learning_rate": 0.1}
        file = recipe(toy, tmp_path / "r.yaml", **settings)
        code, text = run_cli("run", str(file), "lora.layers=top-half", "--out", str(tmp_path / place))
        assert code == 0, text
        roles = ["policy"] + ["critic"] * (name != "ppo")
        files = [tmp_path / place / role / "adapter" / "adapter_model.safetensors" for role in roles]
        ends.append([load_file(file) for file in files])
    for once, anew in zip(*ends, strict=True):
        assert max(float(tensor.abs().max()) for key, tensor in once.items() if "lora_B" in key) > 0.01
        for key, tensor in once.items():
            torch.testing.assert_close(tensor, anew[key], rtol=0, atol=1e-5)


UNDO: dict[str, Callable[[float], float]] = {
    "times_100": lambda x: x / 100,
    "percent": lambda x: x * 100,
    "shifted": lambda x: x - 1000,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reinforce", ("times_100",)),
        ("ppo, own critic", ("percent", "shifted")),
        ("rloo", ("shifted",)),
        *(pytest.param(name, tuple(UNDO), marks=pytest.mark.slow) for name in ("reinforce", "ppo", "rloo")),
    ],
)
def test_the_scale_of_the_reward_changes_nothing_but_rounding(
    name: str, changes: tuple[str, ...], toy: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """Critic and KL penalty use the normalized reward; reports have the raw one."""
    curves = {}
    for reward in ("contains", *changes):
        settings = ALGORITHMS[name] | {"steps": 6, "kl_coef": 0.2}
        file = recipe(toy, tmp_path / "r.yaml", reward=reward, **settings)
        curves[reward] = run(run_cli, file, tmp_path / reward)[1]
    plain = curves.pop("contains")
    for reward, scaled in curves.items():
        for key in ("reward", "score"):
            assert [UNDO[reward](step[key]) for step in scaled] == pytest.approx([step[key] for step in plain])
        for key in ("policy_loss", "kl", "value_loss"):
            expected = pytest.approx([step[key] for step in plain], abs=1e-5)
            assert [step[key] for step in scaled] == expected, (reward, key)


@pytest.mark.parametrize("name", ["reinforce", "ppo, own critic", "rloo"])
def test_a_rollout_of_equal_rewards_makes_no_step(name: str, toy: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """Scaled to unit spread, the remaining rounding would give a full-size step of noise."""
    settings = ALGORITHMS[name] | {"steps": 3, "missing_end_penalty": 1.0, "guard": "off"}
    file, out = recipe(toy, tmp_path / "r.yaml", reward="constant", **settings), tmp_path / "out"
    code, text = run_cli("run", str(file), "--out", str(out))
    assert code == 0, text
    assert "for the critic's head" in text or name == "rloo"
    told = "completions before RL are all 0.7: as long as they are equal, nothing can be learned"
    assert told in " ".join(text.split())
    steps = [json.loads(line) for line in (out / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert [step["no_signal"] for step in steps] == [1.0, 1.0, 1.0]
    weights = load_file(out / "policy" / "adapter" / "adapter_model.safetensors")
    assert all(not tensor.any() for key, tensor in weights.items() if "lora_B" in key)


def test_a_missing_end_is_no_signal_where_rewards_are_equal(toy: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """Otherwise a policy with a rare reward would learn to stop at once from all rollouts without reward."""
    settings = ALGORITHMS["ppo"] | {"steps": 4, "missing_end_penalty": 1.0, "guard": "off"}
    _, steps = run(run_cli, recipe(toy, tmp_path / "r.yaml", reward="once", **settings), tmp_path / "out")
    assert 0 < steps[-1]["ended"] < 1  # the penalty tells completions apart
    assert steps[0]["reward_std"] > 0
    assert [step.get("no_signal", 0.0) for step in steps] == [0.0, 1.0, 1.0, 1.0]


def test_one_absurd_reward_is_said_and_learning_goes_on(toy: Path, tmp_path: Path, run_cli: RunCli) -> None:
    settings = ALGORITHMS["ppo"] | {"steps": 5}
    file, out = recipe(toy, tmp_path / "r.yaml", reward="absurd", **settings), tmp_path / "out"
    code, text = run_cli("run", str(file), "--out", str(out))
    assert code == 0, text
    assert "Step 3: a reward of 1e+09 lies more than 100 standard deviations" in " ".join(text.split())
    steps = [json.loads(line) for line in (out / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert all("no_signal" not in step for step in steps)
    assert steps[-1]["reward_std"] < 10


def test_a_reward_function_that_draws_from_numpy_draws_the_same_again(
    toy: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    rewards = []
    for place in ("a", "b"):
        np.random.seed(None)
        file = recipe(toy, tmp_path / "r.yaml", reward="drawn", steps=2)
        rewards.append([step["reward"] for step in run(run_cli, file, tmp_path / place)[1]])
    assert rewards[0] == rewards[1]


def test_a_run_says_how_good_its_critic_is_and_what_the_clip_took(
    toy: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    settings = ALGORITHMS["ppo"] | {"clip": 0.01, "steps": 12}
    _, steps = run(run_cli, recipe(toy, tmp_path / "r.yaml", **settings), tmp_path / "out")
    assert max(step["clip_fraction"] for step in steps) > 0.05
    assert steps[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # the head begins at zero
    assert all(step["explained_variance"] <= 1 for step in steps)


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_settings_of_an_algorithm_are_the_recipes(name: str, toy: Path, tmp_path: Path) -> None:
    """Keys that are unset get the algorithm's default; those that are set are kept."""
    left_out = load_recipe(recipe(toy, tmp_path / "r.yaml"), [f"rl.algorithm={name}"]).rl
    said = load_recipe(recipe(toy, tmp_path / "r.yaml"), [f"rl.algorithm={name}", "rl.epochs=3"]).rl
    assert left_out is not None
    assert said is not None
    assert (left_out.epochs, left_out.samples_per_prompt) == (2, 4 if name == "rloo" else 1)
    assert said.epochs == 3
    row = said.model_copy(update={"gae_lambda": 0.5, "clip": 0.1, "value_clip": 0.0}).row
    assert (row.gae_lambda, row.clip, row.value_clip) == (0.5, 0.1, 0.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rl.minibatches=2"], "and 4 updates; learning rate 0.01, 0.2 for the critic's head."),
        (["rl.algorithm=trpo"], "and 1 update; learning rate 0.2 for the critic's head."),
        (["rl.algorithm=rloo", "rl.direction=natural", "rl.trust_region=0.01", "rl.epochs=1"], "and 1 update.\n"),
    ],
)
def test_the_plan_counts_all_updates_and_a_natural_gradient_has_no_learning_rate(
    overrides: list[str], said: str, toy: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(recipe(toy, tmp_path / "r.yaml"), overrides)
    assert loaded.rl is not None
    loop = SimpleNamespace(learner=SimpleNamespace(rates=[0.01, 0.2]), algorithm=loaded.rl.row)
    assert said in rl._plan(cast(Any, SimpleNamespace(recipe=loaded)), cast(Any, loop))
    assert rl._policy_rate(cast(Any, loop)) == (
        0.01 if "minibatches" in overrides[0] else None
    )  # what report.json has


def test_a_finished_stage_is_not_run_again(toy: Path, tmp_path: Path, run_cli: RunCli) -> None:
    file = recipe(toy, tmp_path / "r.yaml", steps=2)
    run(run_cli, file, tmp_path / "out")
    weights = tmp_path / "out" / "policy" / "adapter" / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    code, text = run_cli("run", str(file), "--out", str(tmp_path / "out"))
    assert code == 0
    assert "already finished" in text
    assert weights.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "reward function failed: KeyError"),
        ("return [float('nan')] * 32", "finite numbers"),
    ],
)
def test_a_reward_function_that_fails_stops_the_run(
    body: str, message: str, toy: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    (tmp_path / "bad.py").write_text(f"def contains(completions, **columns):\n    {body}\n")
    file = recipe(toy, tmp_path / "r.yaml", steps=2)
    content = yaml.safe_load(file.read_text())
    content["rl"]["reward"]["function"] = f"{tmp_path}/bad.py:contains"
    file.write_text(yaml.safe_dump(content))
    code, text = run_cli("run", str(file), "--out", str(tmp_path / "out"))
    assert code == 2
    assert message in text
    assert "Traceback" not in text
