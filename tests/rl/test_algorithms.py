"""The rows of the table: what each makes of a rollout, worked by hand."""

from dataclasses import replace

import pytest
import torch

from perl.data.records import Prompt
from perl.rl.algorithms import ALGORITHMS, Targets
from perl.rl.rollout import Rollout
from perl.roles.roles import Outputs

MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
LOG_PROBS = torch.zeros(4, 2)


def rollout(values: torch.Tensor | None = None, each: int = 2) -> Rollout:
    """Four completions, `each` of a prompt; what the policy and its reference say of them is the same."""
    ones_BL = torch.cat([torch.ones(4, 1).bool(), MASK], 1)
    return Rollout(
        ids_BL=ones_BL.long(),
        mask_BL=ones_BL,
        prompt_lengths=[1] * 4,
        completion_lengths=MASK.sum(1).tolist(),
        ended_B=torch.ones(4).bool(),
        sampler_log_probs_BT=LOG_PROBS,
        prompts=[Prompt((), "")] * 4,
        groups=[row // each for row in range(4)],
        texts=[""] * 4,
        rewards_B=torch.zeros(4),
        reward_parts={},
        policy_log_probs_BT=LOG_PROBS,
        reference_log_probs_BT=LOG_PROBS,
        values_BT=values,
    )


def test_rloo_keeps_the_baseline_and_the_spread_of_its_groups() -> None:
    """Leave-one-out's own mean is its baseline: shifted over the batch it would be another estimator."""
    rewards_B = torch.tensor([3.0, 1.0, 10.0, 10.0])
    advantages_BT = ALGORITHMS["rloo"].estimate(rollout(), rewards_B, kl_coef=0.0).advantages_BT
    assert advantages_BT.tolist() == [[2.0, 2.0], [-2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_actor_critic_advantages_are_whitened_returns_less_values(name: str) -> None:
    """With λ = 1 both are the return to go less the value; here the returns are the scores."""
    values_BT = torch.tensor([[1.0, 1.0], [0.0, 9.0], [1.0, 3.0], [0.0, 9.0]])
    targets = ALGORITHMS[name].estimate(rollout(values_BT), torch.tensor([2.0, 0.0, 4.0, -2.0]), kl_coef=0.0)
    assert targets.returns_BT is not None
    assert targets.returns_BT.tolist() == [[2.0, 2.0], [0.0, 0.0], [4.0, 4.0], [-2.0, 0.0]]
    raw = torch.tensor([1.0, 1.0, 0.0, 3.0, 1.0, -2.0])
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(targets.advantages_BT[MASK], expected)


def test_gae_lambda_is_the_recipes() -> None:
    """λ = 0 leaves the one-step difference: values of the next state less those of this one."""
    values_BT = torch.tensor([[1.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    ppo = replace(ALGORITHMS["ppo"], gae_lambda=0.0, scaling="none")
    rewards_B = torch.tensor([2.0, 0.0, 0.0, 0.0])
    advantages_BT = ppo.estimate(rollout(values_BT), rewards_B, kl_coef=0.0).advantages_BT
    assert advantages_BT[0].tolist() == [3.0, -2.0]


@pytest.mark.parametrize(
    ("name", "scores", "signal"),
    [
        ("ppo", [0.5, 0.5, 0.5, 0.5], False),
        ("ppo", [0.5, 0.5, 0.5, 0.5 + 1e-7], False),
        ("ppo", [0.5, 0.5, 0.5, 0.6], True),
        ("ppo", [0.5, 0.5, 0.5, float("inf")], True),
        ("rloo", [0.0, 0.0, 7.0, 7.0], False),  # groups differ, completions of one prompt do not
        ("rloo", [0.0, 0.0, 7.0, 7.1], True),
    ],
)
def test_equal_scores_carry_no_signal(name: str, scores: list[float], signal: bool) -> None:
    assert ALGORITHMS[name].has_signal(rollout(), torch.tensor(scores)) is signal


def test_the_clip_fraction_counts_tokens_whose_gradient_is_gone() -> None:
    """Ratio 1.5 with a positive advantage is clipped, with a negative one it is not; one of six tokens."""
    log_probs_BT = torch.zeros(4, 2)
    log_probs_BT[0, 0] = log_probs_BT[1, 0] = torch.tensor(1.5).log()
    advantages_BT = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    outputs, targets = Outputs(log_probs_BT), Targets(advantages_BT, None)
    _, clipped = ALGORITHMS["ppo"].policy_loss(outputs, rollout(), targets, 6.0)
    assert float(clipped) == pytest.approx(1 / 6)
    assert ALGORITHMS["reinforce"].policy_loss(outputs, rollout(), targets, 6.0)[1] is None
