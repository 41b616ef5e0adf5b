"""Parameters changed for a moment by a known amount, to see who computes with them.

An update of training is smaller than the rounding of a bfloat16 base, and where RL starts from the bare base all
roles are equal: a stale sampler, or one that computes as another role, cannot be seen there. A perturbation of the
parameters is as large as it has to be. Afterwards they are the same bytes again.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

LARGE = 2**22
"""Elements of a tensor above which only `PART` of them are perturbed and kept; most adapters have fewer."""
PART = 4096


@contextlib.contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield the parameters' data to be changed in place; afterwards they are the bytes that they were."""
    parameters = list(parameters)
    parts = [part_of(parameter) for parameter in parameters]
    kept = [part.clone() for part in parts]
    try:
        yield parts
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            part_of(parameter).copy_(before)  # found anew: packing for sampling gives a weight another storage


@contextlib.contextmanager
def perturbed(parameters: Iterable[nn.Parameter], size: float) -> Iterator[None]:
    """Inside, noise is added to the parameters; the same in all processes, and each time.

    Args:
        size: the noise's standard deviation, as a share of each tensor's root mean square, or of what a new tensor
            of its width would have, if that is more (LoRA's B starts at zero).
    """
    with restored(parameters) as parts:
        for seed, part in enumerate(parts):
            generator = torch.Generator(part.device).manual_seed(seed)
            noise = torch.randn(part.shape, generator=generator, device=part.device, dtype=torch.float32)
            unit = max(float(part.float().square().mean().sqrt()), 1 / math.sqrt(part.shape[-1]))
            part.add_((noise * (size * unit)).to(part.dtype))
        yield


def part_of(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that may be perturbed: all of it, or of a large one the first elements, flat."""
    data = parameter.data
    return data if data.numel() <= LARGE or not data.is_contiguous() else data.view(-1)[:PART]
