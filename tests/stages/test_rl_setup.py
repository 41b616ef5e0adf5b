"""The start of RL: an adapter critic, learning rates, and the penalty for a missing end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perl.recipe import load_recipe
from perl.rl.algorithms import ALGORITHMS
from perl.rl.checks.guard_state import Limits
from perl.rl.checks.guards import Guard
from perl.rl.loop import InitialEval, Loop, checkpoint, resume
from perl.roles.role import Role
from perl.stages.opening import open_session
from perl.stages.rl_setup import eval_prompts, how_to_hold, missing_end_penalty, setup
from tests.conftest import DRINKS, RunCli, WriteRecipe, write_rows

REWARD = {"loss": "thumbs", "epochs": 2, "batch_size": 4, "learning_rate": 0.01, "max_length": 64}


def begun(recipe_file: Path, out: Path) -> Loop:
    session = open_session(load_recipe(recipe_file), out)
    return setup(session, eval_prompts(session))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_an_adapter_critic_begins_as_the_reward_model_with_a_head_of_zeros(
    tuning: str, write_recipe: WriteRecipe, tmp_path: Path, run_cli: RunCli
) -> None:
    """The reward head gives log-odds, the critic predicts returns: another scale, and often another sign."""
    rl = {"critic": "adapter", "steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2}
    file = write_recipe(tuning=tuning, reward=REWARD, rl=rl)
    code, text = run_cli("reward", file, "--out", tmp_path / "out")
    assert code == 0, text
    roles = begun(file, tmp_path / "out").learner.roles
    assert roles.head(Role.REWARD).weight.abs().max() > 0.001
    assert not roles.head(Role.CRITIC).weight.any()
    reward, critic = roles.weights(Role.REWARD), roles.weights(Role.CRITIC)
    assert all(torch.equal(reward[name], critic[name]) for name in reward)
    assert any(weight.abs().max() > 0.001 for weight in critic.values())


def test_learning_rates_are_the_recipes_or_follow_the_base(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    def rates(**rl: Any) -> list[float]:
        given = {"reward": {"function": "rewards.py:length"}, "max_new_tokens": 4} | rl
        return begun(write_recipe(reward=None, rl=given), tmp_path / "out").learner.rates

    adapters, head = rates(algorithm="reinforce")  # of a base of width 32
    assert adapters == pytest.approx(4e-3 * 4**0.8, rel=0.05)
    assert 0.2 / 32 / 2 < head < 0.2 / 32 * 2  # its last norm leaves states of about 1
    assert rates(algorithm="ppo")[0] == pytest.approx(adapters / 2, rel=0.05)
    assert rates(learning_rate=1e-5, head_learning_rate=1e-4) == [1e-5, 1e-4]


def test_a_resumed_run_knows_how_far_rounding_moved_the_log_probs_before(
    write_recipe: WriteRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    """Its first updates are checked again, with limits that follow from this."""
    rl = {"reward": {"function": "rewards.py:length"}, "max_new_tokens": 4}
    file = write_recipe(reward=None, rl=rl, base={"model": str(tiny_llama), "dtype": "bfloat16"})
    first, resumed = (begun(file, tmp_path / "out") for _ in range(2))
    checkpoint(first, 0, InitialEval(first.preflight.check(), {}))
    resume(resumed)
    assert resumed.preflight.apart == first.preflight.apart > 0


@pytest.mark.parametrize(
    ("algorithm", "remedy"), [("ppo", "raise rl.kl_coef"), ("cispo", "set rl.kl"), ("kimi", "raise rl.tau")]
)
def test_an_alarm_advises_a_key_that_has_an_effect(algorithm: str, remedy: str) -> None:
    guard = Guard(Limits(kl=1.0, hold=how_to_hold(ALGORITHMS[algorithm])))
    alarms = [alarm for step in range(1, 10) for alarm in guard.check(step, {"kl": 2.0})]
    assert f"Lower rl.learning_rate or {remedy}" in alarms[0].remedy


@pytest.mark.parametrize(
    ("algorithm", "kl_coef", "kl_term"), [("grpo", 0.1, True), ("grpo", 0, False), ("cispo", 0.1, False)]
)
def test_the_guard_knows_whether_a_kl_term_holds_the_policy(
    algorithm: str, kl_coef: float, kl_term: bool, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": f"A {drink}, please."} for drink in DRINKS])
    data = {"source": "jsonl", "path": str(rows), "held_out": 0.5}
    rl = {"reward": {"function": "rewards.py:length"}, "algorithm": algorithm, "kl_coef": kl_coef}
    loop = begun(write_recipe(reward=None, sft=None, data=data, rl=rl), tmp_path / "out")
    assert loop.guarding.guard._limits.kl_term is kl_term


@pytest.mark.parametrize(
    ("chat", "given", "expected"), [(False, None, 0.0), (True, None, 0.5), (False, 0.5, 0.5), (True, 0.0, 0.0)]
)
def test_a_missing_end_costs_nothing_on_plain_text(
    chat: bool, given: float | None, expected: float, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    asked = [f"A {drink}, please." for drink in DRINKS]
    rows = [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in asked]
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "p.jsonl", rows)), "held_out": 0.5}
    rl = {"reward": {"function": "rewards.py:length"}, "missing_end_penalty": given}
    recipe = load_recipe(write_recipe(reward=None, data=data, rl=rl))
    session = open_session(recipe, tmp_path / "out")
    assert recipe.rl is not None
    assert missing_end_penalty(recipe.rl, session.train.prompts[0]) == expected
