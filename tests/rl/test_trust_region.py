"""The trust region of a step, on a tiny Llama with adapters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from perl.errors import UserError
from perl.recipe import load_recipe
from perl.rl.algorithm import Targets
from perl.rl.algorithms import ALGORITHMS
from perl.rl.natural_gradient import Fisher, Moments
from perl.rl.trust_region import TrustRegion
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.conftest import RunCli, WriteRecipe
from tests.rl.rollouts import MASK, rollout
from tests.tiny import lora, random_llama

IDS = torch.tensor([[5, 6, 7], [5, 8, 0], [9, 6, 4], [9, 3, 0]])
ADVANTAGES_BT = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.5, 0.5], [-2.0, 0.0]])


@pytest.fixture
def roles() -> SharedBase:
    """Return roles with a policy that differs from its initial state."""
    roles = SharedBase(lora(random_llama(vocab_size=12), rank=1, targets=["q_proj", "down_proj"]))
    roles.add(Role.POLICY)
    roles.train_only(Role.POLICY)
    roles.eval()
    with torch.no_grad():
        for parameter in roles.parameters_of(Role.POLICY):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return roles


def region(roles: SharedBase, name: str = "trpo", limit: float = 0.01, micro_batch_size: int = 3) -> TrustRegion:
    batch = rollout(ids_BL=IDS)
    old_BT = roles(
        Role.POLICY, batch.ids_BL, batch.mask_BL, completion_length=2, temperature=0.8
    ).log_probs_BT.detach()
    batch = replace(batch, policy_log_probs_BT=old_BT)
    row = replace(ALGORITHMS[name], trust_region=limit)
    return TrustRegion(roles, row, batch, Targets(ADVANTAGES_BT, None), limit, 0.8, 8, micro_batch_size, False)


def distributions(roles: SharedBase) -> Categorical:
    """Return the distributions of the rollout's six tokens."""
    batch = rollout(ids_BL=IDS)
    with roles.role(Role.POLICY):
        logits_BLV = roles.lm(batch.ids_BL, attention_mask=batch.mask_BL.long()).logits
    return Categorical(logits=logits_BLV[:, :-1][MASK] / 0.8)


def move(roles: SharedBase, size: float) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in roles.parameters_of(Role.POLICY):
            parameter.add_(size * torch.randn(parameter.shape))


def test_the_probes_kl_is_exact_and_what_was_before_is_no_distance_away(roles: SharedBase) -> None:
    held, before = region(roles), distributions(roles)
    assert held.probe().kl == 0.0
    assert held.probe().loss == pytest.approx(-float(ADVANTAGES_BT.sum()) / 6, abs=1e-6)
    move(roles, 0.05)
    expected = float(kl_divergence(before, distributions(roles)).mean().detach())
    assert expected > 1e-3
    assert held.probe().kl == pytest.approx(expected, rel=1e-4)


def test_a_process_may_have_a_single_completion(roles: SharedBase) -> None:
    batch = rollout(ids_BL=IDS).take([0])
    row, targets = replace(ALGORITHMS["trpo"], trust_region=0.01), Targets(ADVANTAGES_BT[:1], None)
    assert TrustRegion(roles, row, batch, targets, 0.01, 0.8, 8, 3, False).probe().kl == pytest.approx(
        0.0, abs=1e-6
    )


def test_the_fisher_matrix_is_that_of_the_adapter(roles: SharedBase) -> None:
    """It equals Jᵀ (diag(p) - p pᵀ) J with the explicit Jacobian of all logits."""
    held = region(roles)
    logits_NV, parameters = distributions(roles).logits[[0, 1, 3, 4]], held.parameters  # every other completion
    rows = [
        torch.cat([one.flatten() for one in torch.autograd.grad(logit, parameters, retain_graph=True)])
        for logit in logits_NV.flatten()
    ]
    jacobian_NVW = torch.stack(rows).view(*logits_NV.shape, -1)
    p_NV = logits_NV.detach().softmax(1)
    vector = torch.randn(jacobian_NVW.shape[2])
    along_NV = jacobian_NVW @ vector
    weighed_NV = p_NV * (along_NV - (p_NV * along_NV).sum(1, keepdim=True))
    expected = torch.einsum("nv,nvw->w", weighed_NV, jacobian_NVW) / len(p_NV)
    product = Fisher(parameters, held.kl_gradient, kl=1e-6).product(vector)
    assert float((product - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_natural_step_is_as_long_as_the_region_and_lowers_the_loss(
    micro_batch_size: int, roles: SharedBase
) -> None:
    held = region(roles, limit=1e-3, micro_batch_size=micro_batch_size)
    before = held.probe().loss
    gradient = loss_gradient(held)
    held.natural_step(Moments(gradient, torch.ones_like(gradient), 1.0), 1.0)
    found = held.probe()
    assert 0.7e-3 <= found.kl <= 1e-3
    assert found.loss < before


def loss_gradient(held: TrustRegion) -> Tensor:
    outputs = held.roles(Role.POLICY, IDS, held.local.mask_BL, completion_length=2, temperature=0.8)
    loss = held.algorithm.policy_loss(outputs, held.local, held.targets, held._sizes)[0]
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, held.parameters)])


def test_too_long_a_step_goes_back_on_the_line_and_a_short_one_stays(roles: SharedBase) -> None:
    held = region(roles, "ppo", limit=1e-3)
    old = [one.detach().clone() for one in held.parameters]
    move(roles, 0.2)
    new = [one.detach().clone() for one in held.parameters]
    found = held.search()
    assert 0 < found["step_kl"] <= 1e-3
    assert 0 < found["step_share"] < 1
    assert found["backtracks"] >= 1
    for parameter, start, end in zip(held.parameters, old, new, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.lerp(start, end, found["step_share"]))
    again = region(roles, "ppo", limit=1e9)
    move(roles, 0.01)
    assert again.search() | {"step_kl": 0.0} == {
        **{"step_kl": 0.0, "step_kl_limit": 1e9, "step_share": 1.0, "backtracks": 0.0}
    }


def test_a_step_that_only_harms_is_undone(roles: SharedBase) -> None:
    held = region(roles, limit=1e-3)
    old = [one.detach().clone() for one in held.parameters]
    gradient = loss_gradient(held)
    held.natural_step(Moments(-gradient, torch.ones_like(gradient), 1.0), 1.0)
    found = held.search()
    assert (found["step_share"], found["step_kl"]) == (0.0, 0.0)
    assert all(torch.equal(one, before) for one, before in zip(held.parameters, old, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "trpo"},
        {"algorithm": "ppo", "critic": "adapter"},
        {"algorithm": "grpo", "samples_per_prompt": 2},
    ],
)
def test_no_step_of_a_run_leaves_the_region(
    changes: dict[str, Any], run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Adapters are on the upper half; there are several micro-batches, with activation checkpointing."""
    rl = {"steps": 3, "prompts_per_step": 4, "micro_batch_size": 3, "max_new_tokens": 6, "eval_prompts": 2}
    rl |= {"reward": {"function": "rewards.py:length"}, "trust_region": 1e-6, **changes}
    recipe = write_recipe(
        reward=None, rl=rl, lora={"rank": 2, "alpha": 4, "layers": "top-half"}, checkpoint_activations=True
    )
    code, text = run_cli("rl", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    steps = [json.loads(line) for line in (tmp_path / "out/policy/metrics.jsonl").read_text().splitlines()]
    assert all(abs(step["step_kl"]) <= step["step_kl_limit"] == 1e-6 for step in steps)
    assert steps[0]["step_kl"] > 0  # the last are so short that rounding may make it negative
    assert changes["algorithm"] == "trpo" or any(step["backtracks"] for step in steps)


def test_full_tuning_has_no_trust_region(write_recipe: WriteRecipe) -> None:
    rl = {"algorithm": "trpo", "reward": {"function": "rewards.py:length"}}
    with pytest.raises(UserError, match="another whole model"):
        load_recipe(write_recipe(reward=None, rl=rl, tuning="full"))
