"""AdamW for weights in bfloat16, which full tuning trains.

A bfloat16 number has 8 significant bits. Rounding to the nearest loses an update of less than a 512th of a weight,
and a second moment, which changes by at most a thousandth of the squares per step, no longer follows them.
Stochastic rounding keeps both on average, without fp32 copies (Zamirai et al. 2020, arXiv 2010.06192).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perl.system.seeds import derived_seed

PIECE = 1 << 16
"""Number of weights that are in fp32 at the same time on a CPU: they stay in its cache."""
PIECE_ON_GPU = 1 << 22
"""The same on a GPU, where a kernel launch costs more than its memory."""


def exact_on_average(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an AdamW, before its first step, in a form that rounds stochastically if weights are in bfloat16."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    if not any(one.dtype == torch.bfloat16 for one in parameters):
        return optimizer
    return StochasticAdamW(optimizer.param_groups)


class StochasticAdamW(torch.optim.AdamW):
    """AdamW that computes in fp32 and rounds weights and moments in bfloat16 stochastically.

    The random numbers depend only on the step and the parameter, so that all processes round alike and a resumed
    run rounds as an uninterrupted one.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is not supported."""
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, number)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"].item())
        generator = torch.Generator(parameter.device).manual_seed(derived_seed(number, "rounding", step))
        whole = [parameter, gradient, state["exp_avg"], state["exp_avg_sq"]]
        size = PIECE if parameter.device.type == "cpu" else PIECE_ON_GPU
        count = -(-parameter.numel() // size) if parameter.dim() else 1
        pieces = (one.chunk(count) if count > 1 else [one] for one in whole)
        for weight, of_gradient, mean, square in zip(*pieces, strict=True):
            _update_piece(weight, of_gradient, mean, square, step, group, generator)


def _update_piece(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    group: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Update weights and moments in place by AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""
    first, second = group["betas"]
    exact, exact_mean, exact_square, gradient = (one.float() for one in (weight, mean, square, gradient))
    exact_mean = exact_mean.lerp(gradient, 1 - first)
    exact_square = (exact_square * second).addcmul_(gradient, gradient, value=1 - second)
    size = (exact_square / (1 - second**step)).sqrt_().add_(group["eps"])
    exact = (exact * (1 - group["lr"] * group["weight_decay"])).addcdiv_(
        exact_mean, size, value=-group["lr"] / (1 - first**step)
    )
    random = torch.empty(weight.shape, dtype=torch.int32, device=weight.device).random_(generator=generator)
    _store(exact, weight, random)
    random >>= 15  # of the 31 random bits, a weight is rounded by the lower 16, its moments by the upper 16
    _store(exact_mean, mean, random)
    _store(exact_square, square, random)


def _store(value: Tensor, target: Tensor, random: Tensor) -> None:
    """Write fp32 values into a tensor; into one in bfloat16 with stochastic rounding.

    bfloat16 is fp32 without its lower 16 bits: a random number below 2^16, added before they are cut off, carries
    with a probability equal to the share of the next number that they are.
    """
    if target.dtype == torch.bfloat16:
        bits = value.view(torch.int32) + (random & 0xFFFF)
        value = (bits & -0x10000).view(torch.float32)
    target.copy_(value)
