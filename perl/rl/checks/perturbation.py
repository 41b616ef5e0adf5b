"""Temporary perturbation of parameters by a known amount, to find out who computes with them.

A training update is smaller than the rounding of a bfloat16 base, and if RL starts from the bare base all roles
are equal: a stale sampler, or one that computes as another role, would go unnoticed. A perturbation is as large as
necessary, and afterwards the parameters are restored to the byte.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

LARGE = 2**22
"""Tensors with more elements are perturbed and saved only in their first `PART`; most adapters have fewer."""
PART = 4096


@contextlib.contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield the parameters' data, which may be changed in place, and restore them to the byte afterwards."""
    parameters = list(parameters)
    parts = [part_of(parameter) for parameter in parameters]
    kept = [part.clone() for part in parts]
    try:
        yield parts
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            part_of(parameter).copy_(before)  # anew: packing for sampling replaces a weight's storage


@contextlib.contextmanager
def perturbed(parameters: Iterable[nn.Parameter], size: float) -> Iterator[None]:
    """Add noise to the parameters inside the block; the same noise in all processes and every time.

    Args:
        size: standard deviation of the noise, as a share of each tensor's root mean square or of that of a newly
            initialised tensor of its width, whichever is larger (LoRA's B starts at zero).
    """
    with restored(parameters) as parts:
        for seed, part in enumerate(parts):
            generator = torch.Generator(part.device).manual_seed(seed)
            noise = torch.randn(part.shape, generator=generator, device=part.device, dtype=torch.float32)
            unit = max(float(part.float().square().mean().sqrt()), 1 / math.sqrt(part.shape[-1]))
            part.add_((noise * (size * unit)).to(part.dtype))
        yield


def part_of(parameter: nn.Parameter) -> Tensor:
    """Return the part of a parameter that may be perturbed: all of it or, if large, its first elements, flat."""
    data = parameter.data
    return data if data.numel() <= LARGE or not data.is_contiguous() else data.view(-1)[:PART]
