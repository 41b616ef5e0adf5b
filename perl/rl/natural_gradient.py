"""The natural gradient (Amari 1998), as TRPO computes it: conjugate gradients on products with the Fisher matrix.

Schulman et al. 2015, arXiv 1502.05477, appendix C. Vectors are fp32 and flat: a number for each trained weight.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def take_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients as one vector, zeros where there is none; the parameters have none afterwards."""
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([part.flatten() for part in parts])


@torch.no_grad()
def add(parameters: Sequence[nn.Parameter], vector: Tensor, factor: Tensor | float) -> None:
    """Add a vector times a factor to the parameters."""
    parts = torch.split(vector, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.add_(part.view_as(parameter) * factor)


@torch.no_grad()
def set_to(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give the parameters these values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def fisher_product(
    parameters: Sequence[nn.Parameter], kl_gradient: Callable[[], Tensor], vector: Tensor, precision: float
) -> Tensor:
    """F v = Jᵀ (diag(p) - p pᵀ) J v, as the gradient of KL(π_old‖π) at θ + εv over ε.

    At θ the KL and its gradient are 0 and its second derivative is F. As a difference it needs first derivatives
    only, which fused kernels, quantized layers and adapters of every kind have. ‖εv‖ is √precision ‖θ‖, where what
    is left out and what is rounded off are about as large.

    Args:
        parameters: θ, left as they are.
        kl_gradient: of the KL from the policy at θ, at the parameters as they are when it is called.
        precision: the relative rounding of what computes, such as that of bf16.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    size = torch.stack([parameter.norm() for parameter in before]).norm()
    step = precision**0.5 * size / vector.norm()
    add(parameters, vector, step)
    gradient = kl_gradient()
    set_to(parameters, before)
    product: Tensor = gradient / step
    return product


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], gradient: Tensor, iterations: int, damping: float
) -> tuple[Tensor, float]:
    """Solve (F + λI) x = g for x, approximately; return x and its curvature xᵀF x.

    Args:
        product: v to F v.
        gradient: g, not 0.
        damping: λ as a share of the curvature along g, gᵀF g / gᵀg; so it means the same whatever the weights'
            scale.
    """
    x, residual = torch.zeros_like(gradient), gradient.clone()
    direction, square, added = residual.clone(), residual.dot(residual), None
    for _ in range(iterations):
        curved = product(direction)
        if added is None:
            added = damping * direction.dot(curved) / square
        curved = curved + added * direction
        along = direction.dot(curved)
        if not float(along) > 0.0:  # rounding, or no curvature at all: x is the best there is
            break
        length = square / along
        x, residual = x + length * direction, residual - length * curved
        last, square = square, residual.dot(residual)
        direction = residual + square / last * direction
    damped = x.dot(gradient - residual)  # xᵀ(F + λI) x
    return x, float(damped - (0.0 if added is None else added * x.dot(x)))
