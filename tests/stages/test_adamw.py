"""AdamW in bfloat16: what rounding to the nearest loses, stochastic rounding keeps on average."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perl.stages.adamw import PIECE, StochasticAdamW, exact_on_average

SETTINGS: dict[str, Any] = {"lr": 5e-5, "weight_decay": 0.1}


def parameter(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape).mul(0.05).to(dtype))


def trained(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int) -> Tensor:
    """Return how far the weights move under noisy gradients of one mean."""
    before = weight.detach().clone().float()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        weight.grad = (1 + 0.5 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        optimizer.step()
    return weight.detach().float() - before


@pytest.mark.parametrize("shape", [(), (7,), (40, 30), (3, PIECE // 2)])
def test_in_fp32_it_is_torchs(shape: tuple[int, ...]) -> None:
    ours, theirs = (parameter(torch.float32, *shape) for _ in range(2))
    trained(StochasticAdamW([ours], **SETTINGS), ours, 5)
    trained(torch.optim.AdamW([theirs], **SETTINGS), theirs, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_updates_below_a_weights_precision_are_kept_on_average() -> None:
    """50 updates of 5e-5 move fp32 weights by 0.0025; those of 0.05 move in steps of 0.0002 in bfloat16."""
    moved = []
    for dtype, kind in ((torch.float32, torch.optim.AdamW), (torch.bfloat16, torch.optim.AdamW)):
        weight = parameter(dtype, 200, 100)
        moved.append(trained(kind([weight], **SETTINGS), weight, 50).mean())
    weight = parameter(torch.bfloat16, 200, 100)
    kept = trained(exact_on_average(torch.optim.AdamW([weight], **SETTINGS)), weight, 50).mean()
    exact, nearest = moved
    assert abs(nearest) < 0.6 * abs(exact)
    assert kept == pytest.approx(float(exact), rel=0.02)


def test_moments_follow_the_gradients() -> None:
    """A second moment in bfloat16 stops at a fraction of the squares that it should converge to."""
    weight = parameter(torch.bfloat16, 100, 100)
    optimizer = exact_on_average(torch.optim.AdamW([weight], lr=1e-4, betas=(0.9, 0.99)))
    trained(optimizer, weight, 400)
    state = optimizer.state[weight]
    assert state["exp_avg_sq"].dtype == torch.bfloat16
    assert float(state["exp_avg_sq"].float().mean()) == pytest.approx(1.25 * (1 - 0.99**400), rel=0.02)
    assert float(state["exp_avg"].float().mean()) == pytest.approx(1.0, rel=0.02)


def test_it_rounds_alike_in_every_process_and_after_resuming() -> None:
    one, other = (parameter(torch.bfloat16, 30, 20) for _ in range(2))
    first, second = StochasticAdamW([one], **SETTINGS), StochasticAdamW([other], **SETTINGS)
    trained(first, one, 3)
    torch.rand(5)  # another state of the global generator
    trained(second, other, 3)
    assert torch.equal(one, other)
    resumed = StochasticAdamW([other], **SETTINGS)
    resumed.load_state_dict(second.state_dict())
    trained(first, one, 2)
    trained(resumed, other, 2)
    assert torch.equal(one, other)


def test_adapters_in_fp32_keep_torchs_optimizer() -> None:
    optimizer = torch.optim.AdamW([parameter(torch.float32, 3, 2)])
    assert exact_on_average(optimizer) is optimizer
