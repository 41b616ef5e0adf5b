"""LoRA on a layer, y = f(x) + s B A x, with two matrix products and no further pass over memory.

peft's forward scales the adapter's output and adds it to the layer's in two further passes over the widest
tensors. Here the second product accumulates into the layer's output in place, with an explicit backward pass. If f
is a frozen linear layer, its backward pass is included, so that the gradients of x from both are also accumulated
in a product. Tests compare everything with peft's.

Axis letters: N tokens, I inputs and O outputs of the layer, R rank.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from perl.private.torch import has_hooks


def _flat(x: Tensor) -> Tensor:
    """Flatten all axes but the last: (N, width)."""
    return x.reshape(-1, x.shape[-1])


def _transposed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous transposed copy: thin products with a transposed view take twice the time."""
    return factor.T.to(dtype, memory_format=torch.contiguous_format)


def _add(y: Tensor, x: Tensor, a_IR: Tensor, b_RO: Tensor, scale: float) -> Tensor:
    """Add s (x Aᵀ) Bᵀ to y in place; return x Aᵀ (N, R)."""
    h_NR = _flat(x) @ a_IR
    y.view(-1, y.shape[-1]).addmm_(h_NR, b_RO, alpha=scale)
    return h_NR


def _gradients(
    ctx: Any, grad_NO: Tensor, x: Tensor, h_NR: Tensor, a_RI: Tensor, b_OR: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x Aᵀ (N, R), and of both factors where they require one."""
    grad_h_NR = (grad_NO @ b_OR.to(x.dtype)).mul_(ctx.scale)
    needs_a, needs_b = ctx.needs_input_grad[2:4]
    grad_a_RI = (grad_h_NR.T @ _flat(x)).to(a_RI.dtype) if needs_a else None
    grad_b_OR = (h_NR.T @ grad_NO).T.to(b_OR.dtype).mul_(ctx.scale) if needs_b else None
    return grad_h_NR, grad_a_RI, grad_b_OR


class _LowRank(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ, written into y; the factors are cast to the dtype of x, as under autocast."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        h_NR = _add(y, x, _transposed(a_RI, x.dtype), _transposed(b_OR, x.dtype), scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h_NR, a_RI, b_OR)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, h_NR, a_RI, b_OR = ctx.saved_tensors
        grad_h_NR, grad_a_RI, grad_b_OR = _gradients(ctx, _flat(grad_y), x, h_NR, a_RI, b_OR)
        grad_x = (grad_h_NR @ a_RI.to(x.dtype)).view_as(x) if ctx.needs_input_grad[1] else None
        return grad_y, grad_x, grad_a_RI, grad_b_OR, None


class _LinearLowRank(torch.autograd.Function):
    """x Wᵀ + bias + s (x Aᵀ) Bᵀ, where W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        h_NR = _add(y, x, _transposed(a_RI, x.dtype), _transposed(b_OR, x.dtype), scale)
        ctx.save_for_backward(x, h_NR, a_RI, b_OR, layer.weight)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, h_NR, a_RI, b_OR, weight_OI = ctx.saved_tensors
        grad_NO = _flat(grad_y)
        grad_h_NR, grad_a_RI, grad_b_OR = _gradients(ctx, grad_NO, x, h_NR, a_RI, b_OR)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (grad_NO @ weight_OI).addmm_(grad_h_NR, a_RI.to(x.dtype)).view_as(x)
        return None, grad_x, grad_a_RI, grad_b_OR, None


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is exactly x Wᵀ + bias: not quantized, and without hooks."""
    return type(layer) is nn.Linear and not has_hooks(layer)


def _plain_and_frozen(layer: nn.Module, x: Tensor) -> bool:
    """Return whether a layer is plain and frozen, and has the dtype of x."""
    return (
        is_plain_linear(layer)
        and layer.weight.dtype == x.dtype
        and not layer.weight.requires_grad
        and (layer.bias is None or not layer.bias.requires_grad)
    )


class _Kept(NamedTuple):
    """An adapter's factors in the form for `_add`."""

    name: str
    a_IR: Tensor
    b_RO: Tensor
    scale: float


class _OneAdapter:
    """The forward of a LoRA layer with at most one active adapter."""

    kept: _Kept | None = None
    """Set inside `kept_factors`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.active_adapters:
            return self.base_layer(x)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        kept, learning = self.kept, torch.is_grad_enabled()
        ready = kept is not None and kept.name == name and kept.a_IR.dtype == x.dtype
        if ready and not learning and not self.lora_dropout.training:
            y: Tensor = self.base_layer(x)
            _add(y, x, kept.a_IR, kept.b_RO, kept.scale)
            return y
        dropped, scale = self.lora_dropout[name](x), self.scaling[name]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if learning and dropped is x and _plain_and_frozen(self.base_layer, x):
            return _LinearLowRank.apply(self.base_layer, x, a, b, scale)  # type: ignore[no-untyped-call,no-any-return]
        return _LowRank.apply(self.base_layer(x), dropped, a, b, scale)  # type: ignore[no-untyped-call,no-any-return]


@contextlib.contextmanager
def kept_factors(layers: Iterable[Any], name: str, dtype: torch.dtype) -> Iterator[None]:
    """Cache this adapter's current factors, cast once, for many forwards without gradients or dropout.

    Training steps inside the context would have no effect on its output.
    """
    layers = list(layers)
    for layer in layers:
        a, b = (factors[name].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        layer.kept = _Kept(name, _transposed(a, dtype), _transposed(b, dtype), layer.scaling[name])
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


def is_plain_lora(layer: Any, name: str) -> bool:
    """Return whether peft's forward of this layer and adapter is f(x) + s B A x, as computed by this module.

    Variants (DoRA, activated LoRA and others) have an entry in `lora_variant` or a layer class of their own.
    """
    kind = type(layer).__mro__[2] if has_own_forward(layer) else type(layer)
    path = f"{kind.__module__}.{kind.__name__}"
    known = path in ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")
    return known and name not in layer.lora_variant and layer.lora_B[name].bias is None


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether a layer uses this module's forward."""
    return isinstance(layer, _OneAdapter)


def compute_with_one_adapter(layer: nn.Module) -> None:
    """Replace the forward of a peft layer with plain LoRA with this module's."""
    compute_as(layer, _OneAdapter)


_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def compute_as(layer: nn.Module, own: type) -> None:
    """Make the forward of class `own` override the layer's."""
    if not isinstance(layer, own):
        kind = type(layer)
        layer.__class__ = _CLASSES.setdefault((kind, own), type(kind.__name__, (own, kind), {}))
