"""The table's rows: each algorithm's advantages and losses for a rollout, worked by hand."""

from dataclasses import replace

import pytest
import torch

from perl.rl.algorithm import Algorithm, Targets
from perl.rl.algorithms import ALGORITHMS
from perl.rl.losses import Sizes
from perl.roles.outputs import Outputs
from tests.rl.rollouts import MASK, rollout

WHOLE = Sizes(tokens=6.0, completions=4.0, longest=8)
BY_GROUPS = [name for name, row in ALGORITHMS.items() if row.compares_groups]


def test_rloo_keeps_the_baseline_and_the_spread_of_its_groups() -> None:
    """The leave-one-out mean is the baseline; with whitening over the batch it would be another estimator."""
    rewards_B = torch.tensor([3.0, 1.0, 10.0, 10.0])
    advantages_BT = ALGORITHMS["rloo"].estimate(rollout(), rewards_B, kl_coef=0.0).advantages_BT
    assert advantages_BT.tolist() == [[2.0, 2.0], [-2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_actor_critic_advantages_are_whitened_returns_less_values(name: str) -> None:
    """With λ = 1 both are the return to go minus the value; here the returns are the scores."""
    values_BT = torch.tensor([[1.0, 1.0], [0.0, 9.0], [1.0, 3.0], [0.0, 9.0]])
    targets = ALGORITHMS[name].estimate(rollout(values_BT), torch.tensor([2.0, 0.0, 4.0, -2.0]), kl_coef=0.0)
    assert targets.returns_BT is not None
    assert targets.returns_BT.tolist() == [[2.0, 2.0], [0.0, 0.0], [4.0, 4.0], [-2.0, 0.0]]
    raw = torch.tensor([1.0, 1.0, 0.0, 3.0, 1.0, -2.0])
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(targets.advantages_BT[MASK], expected)


def test_gae_lambda_is_the_recipes() -> None:
    """λ = 0 leaves the one-step difference: the value of the next state minus that of this one."""
    values_BT = torch.tensor([[1.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    ppo = replace(ALGORITHMS["ppo"], gae_lambda=0.0, whiten=False)
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
        ("grpo", [0.0, 0.0, 7.0, 7.0], False),
        ("maxrl", [0.0, 1.0, 0.0, 0.0], True),
        ("maxrl", [-1.0, 0.0, -3.0, -2.0], False),  # where the mean is not above 0 it gives no advantage
    ],
)
def test_equal_scores_carry_no_signal(name: str, scores: list[float], signal: bool) -> None:
    assert ALGORITHMS[name].has_signal(rollout(), torch.tensor(scores)) is signal


def test_the_clip_fraction_counts_tokens_whose_gradient_is_gone() -> None:
    """Ratio 1.5 is clipped with a positive advantage and not with a negative one; one of six tokens."""
    log_probs_BT = torch.zeros(4, 2)
    log_probs_BT[0, 0] = log_probs_BT[1, 0] = torch.tensor(1.5).log()
    advantages_BT = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    outputs, targets = Outputs(log_probs_BT), Targets(advantages_BT, None)
    _, clipped = ALGORITHMS["ppo"].policy_loss(outputs, rollout(), targets, WHOLE)
    assert float(clipped) == pytest.approx(1 / 6)
    assert ALGORITHMS["reinforce"].policy_loss(outputs, rollout(), targets, WHOLE)[1] is None


def loss_of(row: Algorithm, log_probs_BT: torch.Tensor, targets: Targets, **changes: torch.Tensor) -> torch.Tensor:
    outputs = Outputs(log_probs_BT, torch.full((4, 2), 3.0))
    return row.policy_loss(outputs, rollout(**changes), targets, WHOLE)[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rloo", [2.0, -2.0, 4.0, -4.0]),
        ("dr-grpo", [1.0, -1.0, 2.0, -2.0]),
        ("kimi", [1.0, -1.0, 2.0, -2.0]),
        ("grpo", [1 / (2**0.5 + 1e-4), -1 / (2**0.5 + 1e-4), 2 / (8**0.5 + 1e-4), -2 / (8**0.5 + 1e-4)]),
        ("maxrl", [0.5, -0.5, 0.5, -0.5]),
    ],
)
def test_advantages_of_groups_by_hand(name: str, expected: list[float]) -> None:
    """Groups with rewards 3 and 1, and 6 and 2: means 2 and 4, standard deviations √2 and √8."""
    targets = ALGORITHMS[name].estimate(rollout(), torch.tensor([3.0, 1.0, 6.0, 2.0]), kl_coef=0.0)
    torch.testing.assert_close(targets.advantages_BT, torch.tensor(expected)[:, None] * MASK)
    assert targets.returns_BT is None


def test_reinforce_plus_plus_by_hand() -> None:
    """β = ½, k1 = 1 on the first token: returns to go are r/2 minus the KL from there on, whitened over tokens."""
    k1_BT = torch.tensor([[1.0, 0.0]] * 4)
    given = rollout(policy_log_probs_BT=k1_BT - 1.0, reference_log_probs_BT=torch.full((4, 2), -1.0))
    row = ALGORITHMS["reinforce++"]
    targets = row.estimate(given, torch.tensor([4.0, 2.0, 0.0, -2.0]), kl_coef=0.5)
    raw = torch.tensor([1.5, 2.0, 0.5, -0.5, 0.0, -1.5])
    torch.testing.assert_close(targets.advantages_BT[MASK], (raw - raw.mean()) / raw.std(correction=0))
    assert not row.needs_critic


def test_reinforce_plus_plus_with_a_baseline_by_hand() -> None:
    targets = ALGORITHMS["reinforce++-baseline"].estimate(rollout(), torch.tensor([3.0, 1.0, 6.0, 2.0]), 0.05)
    raw = torch.tensor([1.0, 1.0, -1.0, 2.0, 2.0, -2.0])
    torch.testing.assert_close(targets.advantages_BT[MASK], (raw - raw.mean()) / raw.std(correction=0))


@pytest.mark.parametrize("name", BY_GROUPS)
def test_a_group_of_equal_rewards_has_no_advantage(name: str) -> None:
    """Neither rounding errors, divided by a spread near 0, nor the mean that whitening subtracts give it one."""
    row = ALGORITHMS[name]
    noise = 0.0 if row.kl == "reward-k1" else 3e-7  # a KL in the reward may differ by as little
    rewards_B = torch.tensor([0.1 + noise, 0.1, 6.0, 2.0])
    targets = row.estimate(rollout(), rewards_B, kl_coef=0.05)
    assert not targets.advantages_BT[:2].any()
    assert targets.advantages_BT[2:][MASK[2:]].all()


def test_the_kl_is_in_the_reward_or_in_the_loss_and_never_in_both() -> None:
    """Here log π - log π_ref is 1 on all tokens; with equal rewards, only the KL remains."""
    given = {"policy_log_probs_BT": torch.zeros(4, 2), "reference_log_probs_BT": torch.full((4, 2), -1.0)}
    rewards_B = torch.zeros(4)
    expected = {"reward-k1": (-0.5, 0.0), "loss-k2": (0.0, 0.5), "loss-k3": (0.0, torch.e**-1), "none": (0.0, 0.0)}
    for kl, (in_reward, in_loss) in expected.items():
        row = Algorithm("return", "plain", kl=kl, value_baseline=False)  # type: ignore[arg-type]
        targets = row.estimate(rollout(**given), rewards_B, kl_coef=0.5)
        assert float(targets.advantages_BT[1, 0]) == in_reward
        loss = loss_of(row, torch.zeros(4, 2), targets, **given)
        assert float(loss) == pytest.approx(0.5 * in_loss), "the mean over tokens times β"


def test_the_reward_keeps_its_weight_beside_a_kl_in_the_loss() -> None:
    rewards_B = torch.tensor([3.0, 1.0, 6.0, 2.0])
    in_loss, in_reward = (
        replace(ALGORITHMS["dr-grpo"], kl=kl).estimate(rollout(), rewards_B, kl_coef=0.5).advantages_BT
        for kl in ("loss-k2", "reward-k1")
    )
    torch.testing.assert_close(in_loss, 2 * in_reward)


def test_the_entropy_bonus_is_a_mean_over_tokens() -> None:
    row, targets = ALGORITHMS["rloo"], Targets(torch.zeros(4, 2), None)
    assert float(loss_of(replace(row, entropy_coef=0.1), torch.zeros(4, 2), targets)) == pytest.approx(-0.3)


def test_groups_that_are_dropped_count_nowhere() -> None:
    """Their tokens count neither in the KL nor in the sizes that losses are divided by."""
    row = replace(ALGORITHMS["dapo"], kl="loss-k2")
    targets = row.estimate(rollout(), torch.tensor([1.0, 1.0, 6.0, 2.0]), kl_coef=1.0)
    assert targets.learned_BT is not None
    assert targets.learned_BT.tolist() == [[False, False], [False, False], [True, True], [True, False]]
    reference_BT = torch.tensor([[9.0, 9.0], [9.0, 9.0], [2.0, 0.0], [0.0, 9.0]])
    zero = targets._replace(advantages_BT=torch.zeros(4, 2))
    loss = row.policy_loss(
        Outputs(torch.zeros(4, 2)), rollout(reference_log_probs_BT=reference_BT), zero, Sizes(3.0, 2.0, 8)
    )[0]
    assert float(loss) == pytest.approx(2.0 / 3)  # ½ 2² / 3


def test_what_is_in_use_is_what_the_loss_reads() -> None:
    """The constants that a row does not list change nothing."""
    changed = {"clip": 0.01, "clip_high": 0.01, "tau": 9.0, "dual_clip": 1.01}
    log_probs_BT = torch.tensor([[0.5, -0.1], [0.3, 0.0], [-0.4, -0.2], [0.6, 0.0]])
    advantages_BT = torch.tensor([[1.0, 1.0], [-2.0, 0.0], [-1.0, -1.0], [-1.0, 0.0]])
    for name, row in ALGORITHMS.items():
        targets = Targets(advantages_BT, None)
        for key, value in changed.items():
            other = replace(row, **{key: value})  # type: ignore[arg-type]
            same = torch.equal(loss_of(row, log_probs_BT, targets), loss_of(other, log_probs_BT, targets))
            assert same is (key not in other.in_use()), (name, key)
