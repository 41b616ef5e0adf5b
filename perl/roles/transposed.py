"""Products with few rows computed transposed, while a model generates in float32 on a CPU.

With two threads MKL computes W xᵀ 1.2 to 3 times as fast as x Wᵀ if x has few rows (2 to 64 rows, 768 to 2,048
inputs, 768 to 8,192 outputs; EPYC with AVX2). On one thread and for small weights there is no clear difference.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perl.roles.packed import is_ordinary

FEW = range(2, 65)
"""Numbers of rows that are computed this way."""
LARGE = 2**19
"""Smallest number of weights."""


@contextlib.contextmanager
def transposed(model: nn.Module) -> Iterator[None]:
    """Make large linear layers compute products with few rows as (W xᵀ)ᵀ; without gradients."""
    several = torch.get_num_threads() > 1
    layers: list[Any] = [part for part in model.modules() if several and _is_large(part)]
    try:
        for layer in layers:
            layer.forward = _Product(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class _Product:
    """x Wᵀ + bias, in place of a layer's own forward."""

    def __init__(self, layer: nn.Linear) -> None:
        self._weight_OI, self._bias_O = layer.weight, layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows not in FEW:
            return F.linear(x, self._weight_OI, self._bias_O)
        y_NO = (self._weight_OI @ x.reshape(rows, -1).T).T.contiguous()
        y = y_NO.view(*x.shape[:-1], -1)
        return y if self._bias_O is None else y.add_(self._bias_O)


def _is_large(part: nn.Module) -> bool:
    return is_ordinary(part, torch.float32) and part.weight.numel() >= LARGE
