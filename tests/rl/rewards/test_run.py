"""The reward model of another run: refused inputs, and the dependence of RL on it."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from perl.recipe import Recipe, load_recipe
from perl.rl.rewards.model import OtherRunsModel, RewardModel
from perl.rl.samplers.base import Samples
from perl.stages.identity import stage_settings
from tests.conftest import RunCli, WriteRecipe

RL = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2}


@pytest.fixture
def trained(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """Return a run with a reward model that is not good enough for RL because of its few ratings."""
    folder = tmp_path / "trained"
    assert run_cli("run", write_recipe(rl=None), "--out", folder)[0] == 0
    return folder


def test_what_cannot_score_is_refused_before_anything_is_trained(
    run_cli: RunCli, write_recipe: WriteRecipe, trained: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(reward=None, rl={**RL, "reward": {"kind": "run", "run": str(trained)}})
    for overrides, expected in (
        (["rl.anyway=false"], "the reward model is not fit for RL"),
        ([f"base.model={tiny_gpt2}"], "has a different tokenizer"),
        ([f"rl.reward.run={tmp_path}"], "this run has no reward model"),
        (["rl.reward.run=nowhere"], "not a run folder"),
    ):
        code, text = run_cli("run", recipe, *overrides, "--out", tmp_path / "out")
        assert code == 2, text
        assert expected in " ".join(text.split())
        assert not (tmp_path / "out").exists()


def test_too_little_memory_for_it_is_not_blamed_on_a_function() -> None:
    def score(*rows: object) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    @dataclass(frozen=True)
    class Rows:
        lower_hidden_BLD: None = None

    reward = OtherRunsModel(cast(RewardModel, SimpleNamespace(rewards=score)))
    with pytest.raises(torch.OutOfMemoryError):
        reward([], cast(Samples, Rows()), [])


def test_rl_depends_on_what_the_reward_model_depends_on(write_recipe: WriteRecipe, trained: Path) -> None:
    recipe = load_recipe(write_recipe(reward=None, rl={**RL, "reward": {"kind": "run", "run": str(trained)}}))

    def settings(recipe: Recipe) -> dict[str, str]:
        return stage_settings(recipe, "rl")

    before = settings(recipe)
    moved = trained.rename(trained.with_name("moved"))
    content = recipe.model_dump()
    content["rl"]["reward"]["run"] = str(moved)
    there = Recipe.model_validate(content)
    assert settings(there) == before
    identity = moved / "reward" / "identity.json"
    identity.write_text(identity.read_text().replace("reward.batch_size", "reward.epochs"))
    assert settings(there) != before
