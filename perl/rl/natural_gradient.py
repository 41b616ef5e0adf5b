"""The natural gradient (Amari 1998) as computed by TRPO: conjugate gradients with Fisher-vector products.

Schulman et al. 2015, arXiv 1502.05477, appendix C. Vectors are fp32 and flat: one number per trained weight.

A Fisher matrix from a few completions says nothing about most directions, and one rollout's gradient is mostly
noise. So the gradient is Adam's mean over rollouts, and the damping is proportional to the size of each weight's
gradients, which also preconditions the solution (Martens 2010, section 4.7). Where the Fisher matrix is silent,
the direction is therefore Adam's. The first steps are shorter, because a mean over few rollouts is noise too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

FIRST_LENGTH = 1e-3
"""Length of the first difference, relative to ‖θ‖, or to 1 if θ is 0, as in new adapters of some kinds."""


def take_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the gradients as one vector, with zeros for missing ones, and clear those of the parameters."""
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([part.flatten() for part in parts])


@torch.no_grad()
def add(parameters: Sequence[nn.Parameter], vector: Tensor, factor: Tensor | float) -> None:
    """Add `factor` times a flat vector to the parameters."""
    parts = torch.split(vector, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.add_(part.view_as(parameter) * factor)


@torch.no_grad()
def set_to(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Set the parameters to these values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


class Moments(NamedTuple):
    """What AdamW knows about the gradients of all steps so far."""

    mean: Tensor
    """m̂, flat."""
    sizes: Tensor
    """√v̂ + ε, flat; infinite for a weight that never had a gradient, which therefore stays where it is."""
    weight: float
    """1 - β₁ᵗ, between 0 and 1: the weight of the t steps so far in a mean that begins at 0."""


@torch.no_grad()
def adams_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Moments:
    """Return the moments of an AdamW with one setting for all, which has seen these parameters equally often."""
    group, states = optimizer.param_groups[0], [optimizer.state[parameter] for parameter in parameters]
    (first, second), step = group["betas"], float(states[0]["step"])  # on a GPU, each read makes the host wait
    mean = torch.cat([state["exp_avg"].flatten() for state in states])
    squares = torch.cat([state["exp_avg_sq"].flatten() for state in states])
    weight = 1 - first**step
    sizes = (squares / (1 - second**step)).sqrt().add(group["eps"]).masked_fill(squares == 0, torch.inf)
    return Moments(mean / weight, sizes, weight)


SAME_SCALE = 4.0
"""A difference is computed again if its KL is off by a larger factor."""
FARTHEST = 30.0
"""Largest factor by which its length changes at once."""
TRIES = 4


@dataclass
class Fisher:
    """The Fisher matrix at θ: F v = Jᵀ (diag(p) - p pᵀ) J v, as the gradient of KL(π_θ‖π_θ+εv) divided by ε.

    At θ the KL and its gradient are 0 and its second derivative is F. A finite difference needs only first
    derivatives, which fused kernels, quantized layers and adapters of every kind have. ε is chosen such that the
    KL is about `kl`, the scale of the step for which the curvature is needed; bf16's rounding is small compared
    with it.

    Args:
        parameters: θ, unchanged afterwards.
        kl_gradient: returns the KL of the policy at the current parameters from the policy at θ, and the KL's
            gradient.
        kl: intended KL, in the unit of `kl_gradient`.

    Attributes:
        length: ‖εv‖ of the last difference.
    """

    parameters: Sequence[nn.Parameter]
    kl_gradient: Callable[[], tuple[float, Tensor]]
    kl: float

    def __post_init__(self) -> None:
        self._theta = [parameter.detach().clone() for parameter in self.parameters]
        norm = torch.stack([parameter.norm() for parameter in self._theta]).norm()
        self.length = FIRST_LENGTH * torch.where(norm > 0, norm, 1.0)

    def product(self, vector: Tensor) -> Tensor:
        """Return F v, flat like `vector`."""
        for tries in range(1, TRIES + 1):
            epsilon = self.length / vector.norm()
            add(self.parameters, vector, epsilon)
            kl, gradient = self.kl_gradient()
            set_to(self.parameters, self._theta)
            scale = (self.kl / kl) ** 0.5 if kl > 0.0 else FARTHEST
            if 1 / SAME_SCALE <= scale**2 <= SAME_SCALE or tries == TRIES:
                break
            self.length = self.length * min(FARTHEST, max(1 / FARTHEST, scale))
        product: Tensor = gradient / epsilon
        return product


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], gradient: Tensor, iterations: int, damping: float
) -> Tensor:
    """Solve (F + λI) x = g for x, approximately.

    Args:
        product: maps v to F v.
        gradient: g, not 0.
        damping: λ relative to the curvature along g, gᵀF g / gᵀg, so that it is independent of the weights'
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
        if not float(along) > 0.0:  # rounding, or no curvature at all: x cannot be improved
            break
        length = square / along
        x, residual = x + length * direction, residual - length * curved
        del curved  # frees a vector before the next product, whose activations are a step's peak
        last, square = square, residual.dot(residual)
        direction = residual + square / last * direction
    return x


def natural_direction(
    product: Callable[[Tensor], Tensor], gradient: Tensor, sizes: Tensor, iterations: int, damping: float
) -> Tensor:
    """Solve (F + λD) x = g for x, approximately, by conjugate gradients preconditioned with D.

    Args:
        product, gradient, iterations: as in `conjugate_gradients`.
        sizes: the diagonal of D, positive or infinite.
        damping: as in `conjugate_gradients`, of D^-½ F D^-½ along D^-½ g.
    """
    root = sizes.rsqrt()
    return root * conjugate_gradients(lambda v: root * product(root * v), root * gradient, iterations, damping)
