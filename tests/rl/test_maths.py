"""The RL arithmetic against numbers worked by hand, and against torchrl."""

import math
from collections.abc import Callable

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
    # Masked entries 0, 4: mean 2, variance ((-2)² + 2²) / 2 = 4, so (x - 2) / 2 = -1, 1; with the mean: 1, 3.
    x_BT = torch.tensor([[0.0, NAN], [4.0, 9.0]])
    mask_BT = torch.tensor([[True, False], [True, False]])
    close(arithmetic.masked_whiten(x_BT, mask_BT), [[-1.0, 0.0], [1.0, 0.0]])
    close(arithmetic.masked_whiten(x_BT, mask_BT, shift_mean=False), [[1.0, 0.0], [3.0, 0.0]])


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
    # γ = ½: 4; 2 + 4/2 = 4; 1 + 4/2 = 3
    half_BT = arithmetic.returns_to_go(rewards_BT, MASK_BT, gamma=0.5)
    close(half_BT, [[3.0, 4.0, 4.0, 0.0], [5.0, 0.0, 0.0, 0.0]])


def test_gae_by_hand() -> None:
    # γ = λ = ½. Answer 1: δ = 1 + ½·1 - 0.5 = 1, 2 + ½·1.5 - 1 = 1.75, 3 + 0 - 1.5 = 1.5 (0 beyond the
    # end); A = 1 + ¼·2.125 = 1.53125, 1.75 + ¼·1.5 = 2.125, 1.5; R = A + V. Answer 2: A = 4 - 1 = 3, R = 4.
    advantages_BT, returns_BT = arithmetic.gae(
        rewards_BT=torch.tensor([[1.0, 2.0, 3.0, NAN], [4.0, NAN, NAN, NAN]]),
        values_BT=torch.tensor([[0.5, 1.0, 1.5, 100.0], [1.0, 100.0, NAN, NAN]]),
        mask_BT=MASK_BT,
        gamma=0.5,
        lam=0.5,
    )
    close(advantages_BT, [[1.53125, 2.125, 1.5, 0.0], [3.0, 0.0, 0.0, 0.0]])
    close(returns_BT, [[2.03125, 3.125, 3.0, 0.0], [4.0, 0.0, 0.0, 0.0]])


def test_gae_agrees_with_torchrl() -> None:
    from torchrl.objectives.value.functional import (  # type: ignore[import-untyped]
        generalized_advantage_estimate,
    )

    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 4, 10]
    rewards_BT, values_BT = torch.randn(2, 4, 10, generator=generator)
    mask_BT = torch.arange(10)[None, :] < torch.tensor(lengths)[:, None]
    advantages_BT, returns_BT = arithmetic.gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.7)
    for row, length in enumerate(lengths):  # torchrl has no padding: answer by answer
        done_T = torch.arange(length) == length - 1
        values_T = values_BT[row, :length]
        advantage, value_target = generalized_advantage_estimate(
            gamma=0.9,
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


def test_kl_by_hand() -> None:
    # π / π_ref = 2: k1 = ln 2, k3 = ½ - 1 + ln 2
    log_probs_BT, reference_BT = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    close(arithmetic.kl_k1(log_probs_BT, reference_BT), [[math.log(2)]])
    close(arithmetic.kl_k3(log_probs_BT, reference_BT), [[math.log(2) - 0.5]])


def test_kl_estimates_are_unbiased() -> None:
    policy_V, reference_V = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (policy_V * (policy_V / reference_V).log()).sum()
    for estimate in (arithmetic.kl_k1, arithmetic.kl_k3):
        expected = (policy_V * estimate(policy_V.log(), reference_V.log())).sum()
        torch.testing.assert_close(expected, exact)


def test_policy_gradient_loss() -> None:
    # -(2 · -1 + -3 · -2) / 2 = -2
    loss = arithmetic.policy_gradient_loss(
        torch.tensor([[-1.0, -2.0, NAN]]), torch.tensor([[2.0, -3.0, NAN]]), MASK_BT[:1, 1:], normalizer=2.0
    )
    close(loss, -2.0)


def test_ppo_policy_loss() -> None:
    # clip 0.2. ρ = 2, A = 1: min(2, 1.2) = 1.2, clipped. ρ = ½, A = 1: min(0.5, 0.8) = 0.5.
    # ρ = ½, A = -1: min(-0.5, -0.8) = -0.8, clipped. ρ = 2, A = -1: min(-2, -1.2) = -2.
    # loss = -(1.2 + 0.5 - 0.8 - 2) / 4 = 0.275; two of four clipped, and these get no gradient.
    ratio_T = torch.tensor([2.0, 0.5, 0.5, 2.0, 7.0])
    log_probs_BT = ratio_T.log()[None].requires_grad_()
    loss, clipped = arithmetic.ppo_policy_loss(
        log_probs_BT,
        policy_log_probs_BT=torch.zeros(1, 5),
        advantages_BT=torch.tensor([[1.0, 1.0, -1.0, -1.0, NAN]]),
        mask_BT=torch.tensor([[True, True, True, True, False]]),
        clip=0.2,
        normalizer=4.0,
    )
    close(loss.detach(), 0.275)
    close(clipped, 0.5)
    (gradient_BT,) = torch.autograd.grad(loss, log_probs_BT)
    close(gradient_BT, [[0.0, -0.5 / 4, 0.0, 2.0 / 4, 0.0]])  # -ρ A / 4 where not clipped


def test_ppo_at_ratio_one_has_the_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs_BT = -torch.rand(2, 4, generator=generator).requires_grad_()
    advantages_BT = torch.randn(2, 4, generator=generator)
    plain = arithmetic.policy_gradient_loss(log_probs_BT, advantages_BT, MASK_BT, 4.0)
    surrogate, clipped = arithmetic.ppo_policy_loss(
        log_probs_BT, log_probs_BT.detach(), advantages_BT, MASK_BT, 0.2, 4.0
    )
    (expected_BT,) = torch.autograd.grad(plain, log_probs_BT)
    (actual_BT,) = torch.autograd.grad(surrogate, log_probs_BT)
    torch.testing.assert_close(actual_BT, expected_BT)
    assert expected_BT[MASK_BT].all()
    assert clipped == 0


def test_value_loss() -> None:
    # V_old = 0, V = 1, c = ½. R = 2: max((1-2)², (0.5-2)²) = 2.25. R = -1: max((1+1)², (0.5+1)²) = 4.
    # Clipped: ½ (2.25 + 4) / 2 = 1.5625. Plain: ½ (1 + 4) / 2 = 1.25.
    values_BT = torch.tensor([[1.0, 1.0, NAN]])
    old_values_BT = torch.tensor([[0.0, 0.0, NAN]])
    returns_BT = torch.tensor([[2.0, -1.0, NAN]])
    mask_BT = torch.tensor([[True, True, False]])
    close(arithmetic.value_loss(values_BT, old_values_BT, returns_BT, mask_BT, 0.5, 2.0), 1.5625)
    close(arithmetic.value_loss(values_BT, old_values_BT, returns_BT, mask_BT, None, 2.0), 1.25)


# Each loss of one learned tensor, the advantages or returns, and what the sampler or old critic gave.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
LOSSES: dict[str, Loss] = {
    "policy gradient": lambda x, target, old, mask, n: arithmetic.policy_gradient_loss(x, target, mask, n),
    "ppo": lambda x, target, old, mask, n: arithmetic.ppo_policy_loss(x, old, target, mask, 0.2, n)[0],
    "value": lambda x, target, old, mask, n: arithmetic.value_loss(x, old, target, mask, None, n),
    "clipped value": lambda x, target, old, mask, n: arithmetic.value_loss(x, old, target, mask, 0.2, n),
}


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name: str) -> None:
    """Answers of unequal lengths: averaging per micro-batch instead would not give the same gradient."""
    generator = torch.Generator().manual_seed(0)
    x_BT, target_BT, noise_BT = torch.randn(3, 6, 5, generator=generator)
    x_BT.requires_grad_()
    old_BT = x_BT.detach() + 0.3 * noise_BT
    mask_BT = torch.arange(5)[None, :] < torch.tensor([5, 1, 2, 5, 3, 1])[:, None]
    tokens = float(mask_BT.sum())

    def gradient(micro_batch: int) -> Tensor:
        total_BT = torch.zeros_like(x_BT)
        for start in range(0, 6, micro_batch):
            rows = slice(start, start + micro_batch)
            loss = LOSSES[name](x_BT[rows], target_BT[rows], old_BT[rows], mask_BT[rows], tokens)
            total_BT += torch.autograd.grad(loss, x_BT)[0]
        return total_BT

    whole_BT = gradient(6)
    assert whole_BT.abs().sum() > 0.1
    torch.testing.assert_close(gradient(2), whole_BT)
    torch.testing.assert_close(gradient(1), whole_BT)


def test_clipped_shares_of_micro_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BT, advantages_BT = torch.randn(2, 2, 4, generator=generator)

    def share(rows: slice) -> Tensor:
        zeros_BT = torch.zeros_like(x_BT[rows])
        return arithmetic.ppo_policy_loss(x_BT[rows], zeros_BT, advantages_BT[rows], MASK_BT[rows], 0.2, 4.0)[1]

    assert share(slice(0, 2)) > 0
    assert share(slice(0, 1)) + share(slice(1, 2)) == share(slice(0, 2))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rubbish", [NAN, math.inf, 1e30])
def test_padding_gets_no_gradient(name: str, rubbish: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(3, 2, 4, generator=generator)
    results = []
    for padding in (0.0, rubbish):
        x_BT, target_BT, old_BT = clean.masked_fill(~MASK_BT, padding).unbind()
        x_BT = x_BT.clone().requires_grad_()
        loss = LOSSES[name](x_BT, target_BT, old_BT, MASK_BT, 4.0)
        results.append((loss.detach(), *torch.autograd.grad(loss, x_BT)))
    (clean_loss, clean_gradient_BT), (loss, gradient_BT) = results
    assert not gradient_BT[~MASK_BT].any()
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient_BT, clean_gradient_BT)
