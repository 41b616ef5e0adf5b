"""KL, token rewards and advantages against numbers worked by hand and against torchrl."""

import math

import pytest
import torch
from torch import Tensor

from perl.rl import maths as arithmetic

NAN = math.nan
MASK_BT = torch.tensor([[True, True, True, False], [True, False, False, False]])


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_masked_mean() -> None:
    x_BT = torch.tensor([[1.0, 2.0, 3.0, NAN], [6.0, NAN, NAN, NAN]])
    close(arithmetic.masked_mean(x_BT, MASK_BT), 3.0)  # (1 + 2 + 3 + 6) / 4
    close(arithmetic.masked_mean(x_BT, torch.zeros_like(MASK_BT)), 0.0)


def test_masked_whiten() -> None:
    # Masked entries 0, 4: mean 2, variance ((-2)² + 2²) / 2 = 4, so (x - 2) / 2 = -1, 1.
    x_BT = torch.tensor([[0.0, NAN], [4.0, 9.0]])
    mask_BT = torch.tensor([[True, False], [True, False]])
    close(arithmetic.masked_whiten(x_BT, mask_BT), [[-1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize("count", [1, 3])
def test_whitening_without_spread_gives_zeros(count: int) -> None:
    mask_BT = torch.arange(4)[None, :] < count
    close(arithmetic.masked_whiten(torch.full((1, 4), 5.0), mask_BT), [[0.0] * 4])


def test_last_token() -> None:
    mask_BT = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    expected = [[False, True, False], [False, False, True], [False, False, False]]
    assert arithmetic.last_token(mask_BT).tolist() == expected


def test_token_rewards() -> None:
    # β = ½. Answer 1: k1 = -1 + 1.5 = 0.5 and -2 + 1 = -1, so -β k1 = -0.25 and 0.5; the
    # last gets ½ · 2 more. Answer 2: k1 = -3 + 3 = 0, and its one token gets ½ · -4.
    rewards_BT = arithmetic.token_rewards(
        score_B=torch.tensor([2.0, -4.0]),
        log_probs_BT=torch.tensor([[-1.0, -2.0, NAN], [-3.0, NAN, NAN]]),
        reference_log_probs_BT=torch.tensor([[-1.5, -1.0, 0.0], [-3.0, 0.0, 0.0]]),
        mask_BT=torch.tensor([[True, True, False], [True, False, False]]),
        kl_coef=0.5,
    )
    close(rewards_BT, [[-0.25, 1.5, 0.0], [-2.0, 0.0, 0.0]])


def test_returns_to_go() -> None:
    rewards_BT = torch.tensor([[1.0, 2.0, 4.0, NAN], [5.0, NAN, NAN, NAN]])
    close(arithmetic.returns_to_go(rewards_BT, MASK_BT), [[7.0, 6.0, 4.0, 0.0], [5.0, 0.0, 0.0, 0.0]])


def test_gae_by_hand() -> None:
    # λ = ½. Answer 1: δ = 1 + 1 - 0.5 = 1.5, 2 + 1.5 - 1 = 2.5, 3 + 0 - 1.5 = 1.5 (0 beyond the end);
    # A = 1.5 + ½·3.25 = 3.125, 2.5 + ½·1.5 = 3.25, 1.5; R = A + V. Answer 2: A = 4 - 1 = 3, R = 4.
    advantages_BT, returns_BT = arithmetic.gae(
        rewards_BT=torch.tensor([[1.0, 2.0, 3.0, NAN], [4.0, NAN, NAN, NAN]]),
        values_BT=torch.tensor([[0.5, 1.0, 1.5, 100.0], [1.0, 100.0, NAN, NAN]]),
        mask_BT=MASK_BT,
        lam=0.5,
    )
    close(advantages_BT, [[3.125, 3.25, 1.5, 0.0], [3.0, 0.0, 0.0, 0.0]])
    close(returns_BT, [[3.625, 4.25, 3.0, 0.0], [4.0, 0.0, 0.0, 0.0]])


def test_gae_agrees_with_torchrl() -> None:
    from torchrl.objectives.value.functional import (  # type: ignore[import-untyped]
        generalized_advantage_estimate,
    )

    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 4, 10]
    rewards_BT, values_BT = torch.randn(2, 4, 10, generator=generator)
    mask_BT = torch.arange(10)[None, :] < torch.tensor(lengths)[:, None]
    advantages_BT, returns_BT = arithmetic.gae(rewards_BT, values_BT, mask_BT, lam=0.7)
    for row, length in enumerate(lengths):  # torchrl has no padding: answer by answer
        done_T = torch.arange(length) == length - 1
        values_T = values_BT[row, :length]
        advantage, value_target = generalized_advantage_estimate(
            gamma=1.0,
            lmbda=0.7,
            state_value=values_T[:, None],
            next_state_value=values_T.roll(-1)[:, None],
            reward=rewards_BT[row, :length, None],
            done=done_T[:, None],
        )
        torch.testing.assert_close(advantages_BT[row, :length], advantage[:, 0])
        torch.testing.assert_close(returns_BT[row, :length], value_target[:, 0])
        assert not advantages_BT[row, length:].any()


def test_leave_one_out() -> None:
    # 1 - (3 + 5)/2 = -3, 3 - (1 + 5)/2 = 0, 5 - (1 + 3)/2 = 3; 0 - (0 + 6)/2 = -3 twice, 6 - 0 = 6
    score_B = torch.tensor([1.0, 3.0, 5.0, 0.0, 0.0, 6.0])
    close(arithmetic.leave_one_out(score_B, 3), [-3.0, 0.0, 3.0, -3.0, -3.0, 6.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group", [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]),
        ("group-std", [-2 / 2.0001, 0.0, 2 / 2.0001, 0.0, 0.0, 0.0]),
        ("group-relative", [-2 / 3, 0.0, 2 / 3, 0.0, 0.0, 0.0]),
        ("leave-one-out", [-3.0, 0.0, 3.0, 0.0, 0.0, 0.0]),
    ],
)
def test_advantages_of_groups(name: str, expected: list[float]) -> None:
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / 2 = 4
    compare = arithmetic.GROUP_ADVANTAGES[name]
    close(compare(torch.tensor([1.0, 3.0, 5.0, -7.0, -7.0, -7.0]), 3), expected)
    with pytest.raises(AssertionError, match="two completions"):
        compare(torch.zeros(3), 1)


def test_maxrl_is_zero_where_the_mean_is_not_above_zero() -> None:
    close(arithmetic.group_relative(torch.tensor([1.0, -1.0, -3.0, 1.0, 0.0, 4.0]), 2), [0, 0, 0, 0, -1.0, 1.0])


def test_equal_groups() -> None:
    score_B = torch.tensor([0.5, 0.5 + 1e-7, 2.0, 2.1])
    assert arithmetic.equal_groups(score_B, 2, 1e-6).tolist() == [True, True, False, False]
    assert not arithmetic.equal_groups(score_B, 2, 0.0).any()
    assert not arithmetic.equal_groups(score_B, 4, 1e-6).any()


def test_kl_by_hand() -> None:
    # π / π_ref = 2: k1 = ln 2, k2 = ½ (ln 2)², k3 = ½ - 1 + ln 2
    log_probs_BT, reference_BT = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    close(arithmetic.kl_k1(log_probs_BT, reference_BT), [[math.log(2)]])
    close(arithmetic.kl_k2(log_probs_BT, reference_BT), [[math.log(2) ** 2 / 2]])
    close(arithmetic.kl_k3(log_probs_BT, reference_BT), [[math.log(2) - 0.5]])


def test_kl_estimates_are_unbiased() -> None:
    policy_V, reference_V = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (policy_V * (policy_V / reference_V).log()).sum()
    for estimate in (arithmetic.kl_k1, arithmetic.kl_k3):
        expected = (policy_V * estimate(policy_V.log(), reference_V.log())).sum()
        torch.testing.assert_close(expected, exact)


def test_the_gradient_of_k2_is_the_kls_and_that_of_k3_is_the_reverse_kls() -> None:
    logits_V, reference_V = torch.tensor([0.7, 0.2, -0.3], requires_grad=True), torch.tensor([0.3, 0.3, 0.4])

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits_V)[0]

    log_policy_V = logits_V.log_softmax(0)
    drawn_V = log_policy_V.exp().detach()
    k2 = gradient((drawn_V * arithmetic.kl_k2(log_policy_V, reference_V.log())).sum())
    log_policy_V = logits_V.log_softmax(0)
    k3 = gradient((drawn_V * arithmetic.kl_k3(log_policy_V, reference_V.log())).sum())
    log_policy_V = logits_V.log_softmax(0)
    torch.testing.assert_close(k2, gradient((log_policy_V.exp() * (log_policy_V - reference_V.log())).sum()))
    log_policy_V = logits_V.log_softmax(0)
    torch.testing.assert_close(k3, gradient(-(reference_V * log_policy_V).sum()))


def test_importance_weights_are_truncated_and_one_where_nothing_differs() -> None:
    mask_BT = torch.tensor([[True, True, True, False]])
    policy_BT = torch.tensor([[0.5, -0.5, 1.5, torch.nan]])
    weights_BT = arithmetic.importance_weights(policy_BT, torch.zeros(1, 4), mask_BT, 2.0)
    torch.testing.assert_close(weights_BT, torch.tensor([[1.6487213, 0.6065307, 2.0, 1.0]]), rtol=1e-6, atol=1e-6)
    assert torch.equal(arithmetic.importance_weights(policy_BT, policy_BT, mask_BT, 2.0), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.1), (6.6, 0.101), (60.0, 0.102), (5.4, 0.099), (0.0, 0.098), (-1.0, 0.098)]
)
def test_the_kl_coefficient_follows_its_target(kl: float, expected: float) -> None:
    """β (1 + 0.1 clip(KL/6 - 1, -0.2, 0.2)) of Ziegler et al."""
    assert arithmetic.adapted_kl_coef(0.1, kl, 6.0) == pytest.approx(expected, abs=1e-6)


def test_the_kl_coefficient_leaves_the_reward_a_weight() -> None:
    assert arithmetic.adapted_kl_coef(0.98, 60.0, 6.0) == 0.99
