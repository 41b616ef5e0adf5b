"""An algorithm and a sampler from a user's files work in a run like those of the package."""

import json
from pathlib import Path
from typing import Any

import pytest

from perl.recipe import load_recipe
from perl.rl.samplers import SAMPLERS
from perl.roles.role import Role
from perl.stages.opening import open_session
from perl.stages.rl import train_rl
from perl.stages.session import Session
from tests.conftest import WriteRecipe

RL: dict[str, Any] = {
    "reward": {"function": "rewards.py:length"},
    "steps": 2,
    "prompts_per_step": 4,
    "max_new_tokens": 6,
    "eval_prompts": 2,
}
ALGORITHM = Path(__file__).parent / "example_algorithm.py"
SAMPLER = Path(__file__).parent / "samplers" / "example_sampler.py"


pytestmark = pytest.mark.usefixtures("own_registries")


def trained(recipe: Path, out: Path) -> tuple[Session, list[dict[str, float]]]:
    session = open_session(load_recipe(recipe), out)
    with session.folder.claim(session.recipe):
        train_rl(session)
    return session, [json.loads(line) for line in (out / "policy" / "metrics.jsonl").read_text().splitlines()]


def test_an_algorithm_of_a_users_own(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(plugins=[str(ALGORITHM)], reward=None, rl=RL | {"algorithm": "group-baseline"})
    session, steps = trained(recipe, tmp_path / "out")
    assert session.recipe.critic == "none"
    assert session.recipe.rl is not None
    assert (session.recipe.rl.samples_per_prompt, session.recipe.rl.epochs) == (4, 2)
    assert all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_a_sampler_of_a_users_own(
    critic: str, exact: bool, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass computes what it does not return: the policy's log-probs and a shared critic's values."""
    rl = RL | {"sampler": {"kind": "generate"}, "algorithm": "ppo", "critic": critic}
    recipe = write_recipe(plugins=[str(SAMPLER)], reward=None, rl=rl)
    load_recipe(recipe)
    told: list[Role] = []
    monkeypatch.setattr(SAMPLERS["generate"], "exact", exact)
    monkeypatch.setattr(SAMPLERS["generate"], "sync", lambda self, role: told.append(role))
    _, steps = trained(recipe, tmp_path / "out")
    assert {Role.BASE, Role.POLICY} <= set(told)
    assert told.count(Role.POLICY) > 2 * RL["steps"], "after each update, and where preflight perturbs it"
    assert all(step["sampler_mismatch"] < 1e-5 for step in steps)
    assert steps[0]["explained_variance"] == pytest.approx(0, abs=1e-6)  # the head begins at zero
    assert steps[1]["explained_variance"] != 0
