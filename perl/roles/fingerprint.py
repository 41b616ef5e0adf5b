"""Detection of changed tensors: a few elements of each are stored and compared later.

A dense change (an optimizer's update, an adapter merged into a weight) alters nearly all elements of a tensor, so
a sample reveals it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 256
"""Number of elements stored per tensor."""

Fingerprint = dict[str, Tensor]
"""The stored elements of each tensor, by its name."""


def fingerprint(tensors: Mapping[str, Tensor]) -> Fingerprint:
    """Return elements at fixed, scattered positions of each tensor (of this process's shard, if it is sharded)."""
    return {name: _sample(tensor) for name, tensor in tensors.items()}


def changed(before: Fingerprint, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors whose stored elements differ in any bit, or which no longer exist."""
    return [
        name
        for name, sample in before.items()
        if name not in tensors or not torch.equal(_bits(sample), _bits(_sample(tensors[name])))
    ]


@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor:
    full: Any = tensor.detach()
    local = full.to_local() if hasattr(full, "to_local") else getattr(tensor, "ds_tensor", full)
    flat = local.reshape(-1)
    if flat.numel() <= ELEMENTS:
        return flat.clone()  # type: ignore[no-any-return]
    # Evenly spaced positions would all fall into one column if the spacing is a multiple of the width.
    generator = torch.Generator().manual_seed(flat.numel())
    places = torch.randint(flat.numel(), (ELEMENTS,), generator=generator)
    return flat[places.to(flat.device)]  # type: ignore[no-any-return]


def _bits(sample: Tensor) -> Tensor:
    """Return the bytes, so that NaN equals NaN and 0 differs from -0."""
    return sample.contiguous().view(torch.uint8)
