"""What LoRA adds to a layer, y = f(x) + s B A x, in two matrix products and no pass over memory besides.

peft's own forward multiplies the adapter's output by its scale and adds it to the layer's as two further passes
over the widest tensors there are. Here the second product adds itself to the layer's output in place, and the
backward pass is written out to match. Tests compare both with peft's.

Axis letters: N tokens, I inputs and O outputs of the layer, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LowRank(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ, written into y; the factors compute in the dtype of x, as autocast would have them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        h_NR = x_NI @ a_RI.to(x.dtype).T
        y.view(-1, y.shape[-1]).addmm_(h_NR, b_OR.to(x.dtype).T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h_NR, a_RI, b_OR)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, h_NR, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_h_NR = (grad_NO @ b_OR.to(x.dtype)).mul_(ctx.scale)
        needs_x, needs_a, needs_b = ctx.needs_input_grad[1:4]
        grad_x = (grad_h_NR @ a_RI.to(x.dtype)).view_as(x) if needs_x else None
        grad_a_RI = (grad_h_NR.T @ x.reshape(-1, x.shape[-1])).to(a_RI.dtype) if needs_a else None
        grad_b_OR = (grad_NO.T @ h_NR).to(b_OR.dtype).mul_(ctx.scale) if needs_b else None
        return grad_y, grad_x, grad_a_RI, grad_b_OR, None


class _OneAdapter:
    """The forward of a LoRA layer of which one adapter at most computes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self._active_adapter:
            return y
        (name,) = self._active_adapter
        dropout, a, b = self.lora_dropout[name], self.lora_A[name].weight, self.lora_B[name].weight
        return _LowRank.apply(y, dropout(x), a, b, self.scaling[name])  # type: ignore[no-untyped-call,no-any-return]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def compute_with_one_adapter(layer: nn.Module) -> None:
    """Let a peft LoRA layer, whatever layer it is on, compute as this module says."""
    kind = type(layer)
    if not issubclass(kind, _OneAdapter):
        layer.__class__ = _CLASSES.setdefault(kind, type(kind.__name__, (_OneAdapter, kind), {}))
