"""Bases without weights, for memory estimates: real shapes and sizes without memory.

Weights, and everything computed from them, are fake tensors: they have a shape, a dtype and a size, but no values.
Token ids and masks are real. Where code asks for a value (is the loss finite, which token was sampled) it gets
zeros (`unknown_values`).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from perl.backbones import backbone_of
from perl.private.torch import FakeTensor, FakeTensorMode, forbid_conversion

LONGEST_ROW = 2**14
"""A longer `arange` is not for positions but for a vocabulary, which is compared with every token."""

_MODE = FakeTensorMode(allow_non_fake_inputs=True)


def fake_lm(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Create a base of this configuration with fake weights."""
    with torch.device("meta"):
        lm = backbone_of(config).new_model(dtype)
    lm.tie_weights()
    fill_with_fakes(lm)
    forbid_conversion(lm)  # fake tensors refuse it
    return lm


def fill_with_fakes(module: nn.Module) -> None:
    """Replace all tensors with fake tensors on the CPU."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if not _is_in_place(parameter.data):
                fake = made.setdefault(id(parameter), nn.Parameter(_like(parameter), parameter.requires_grad))
                setattr(part, name, fake)
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            if not _is_in_place(buffer):
                setattr(part, name, _like(buffer))


def _is_in_place(tensor: Tensor) -> bool:
    """Return whether a tensor is already a fake CPU tensor; a fake and a meta tensor give a fake meta tensor."""
    return isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def _like(tensor: Tensor) -> Tensor:
    with _MODE:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


class _Unknown(TorchFunctionMode):
    """Mode that returns zeros if code asks for the values of a fake tensor."""

    ASKS = frozenset(getattr(Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__int__"))
    DRAWS = frozenset({torch.multinomial, torch.searchsorted})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], FakeTensor):
            if func in self.ASKS:
                return func(torch.zeros(args[0].shape, dtype=args[0].dtype))
            if func is torch.allclose:
                return True
            if func in self.DRAWS:  # ids need values, since they are used as indices
                return torch.zeros(func(*args, **kwargs).shape, dtype=torch.long)
        return func(*args, **kwargs)


MAKERS = ("empty", "zeros", "ones", "full", "arange")


def _fake_maker(name: str) -> Any:
    """Wrap a factory so that floats and vocabularies are fake; token ids, masks and counters stay real."""
    make = getattr(torch, name)

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        with _MODE:
            fake: Tensor = make(*args, **kwargs)
        wanted = (fake.is_floating_point() and fake.dim()) or (name == "arange" and fake.numel() > LONGEST_ROW)
        if wanted and fake.device.type != "meta":
            return fake
        result: Tensor = make(*args, **kwargs)
        return result

    return made


def _as_one_expert(x_SI: Tensor, w_EIO: Tensor, offs: Tensor) -> Tensor:
    """Stand in for torch's product of each row with its expert's matrix, whose fake kernel takes only bfloat16.

    As if one expert got all rows: as many operations, and results of the same size.
    """
    product: Tensor = x_SI @ w_EIO[0]
    return product


@contextlib.contextmanager
def unknown_values() -> Iterator[None]:
    """Make new float tensors fake inside the context, and return zeros for the values of fake tensors."""
    with contextlib.ExitStack() as stack:
        for name in MAKERS:  # patched: a function mode does not reach the backward pass of custom functions
            stack.enter_context(mock.patch.object(torch, name, _fake_maker(name)))
        if hasattr(F, "grouped_mm"):
            stack.enter_context(mock.patch.object(F, "grouped_mm", _as_one_expert))
        stack.enter_context(_Unknown())
        yield
