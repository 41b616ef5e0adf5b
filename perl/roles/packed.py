"""Weights in oneDNN's own layout while a model generates on a CPU.

The cost of a product with few rows is that of reading the weight, and a plain weight is read at half the speed of
a packed one. Packing does not round; a packed weight replaces the plain one in memory and is unpacked to the same
bytes.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from perl.adapters.low_rank import is_plain_linear
from perl.measure.probe import mark
from perl.private.torch import PACKS_BF16, packed_linear, packed_weight


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Make linear layers compute with packed weights, without gradients; the plain weights are empty meanwhile.

    Layers are not packed if they are not bf16 on a CPU, if another module shares their weight (a tied output
    embedding), or if a library has added a hook or uses its own kind of weight.
    """
    users = Counter(id(weight) for part in model.modules() for weight in part.parameters(recurse=False))
    layers: list[Any] = [part for part in model.modules() if PACKS_BF16 and _packable(part)]
    now_packed: list[Any] = []
    try:
        for layer in layers:
            if users[id(layer.weight)] == 1:
                now_packed.append(layer)
                _pack(layer)
        yield
    finally:
        for layer in now_packed:
            _unpack(layer)


class _Product:
    """x Wᵀ + bias, in place of a layer's own forward."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self._bias)


def is_ordinary(part: nn.Module, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Return whether a module is a plain linear layer with its own forward and a CPU weight of this dtype."""
    return (
        is_plain_linear(part)
        and "forward" not in vars(part)
        and type(part.weight.data) is Tensor
        and part.weight.dtype == dtype
        and part.weight.device.type == "cpu"
    )


def _packable(part: nn.Module) -> bool:
    return is_ordinary(part, torch.bfloat16) and part.weight.numel() > 0


def _pack(layer: Any) -> None:
    weight = packed_weight(layer.weight.detach())
    mark("base_weights", [weight])
    layer.forward = _Product(weight, layer.bias)
    layer.weight.data = layer.weight.data.new_empty(0)


def _unpack(layer: Any) -> None:
    product = vars(layer).get("forward")
    if product is not None:  # None: interrupted before it was packed
        layer.weight.data = product.weight.to_dense()
        mark("base_weights", [layer.weight])
        del layer.forward
