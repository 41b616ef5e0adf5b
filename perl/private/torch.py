"""The private interfaces of torch that this package uses."""

import functools
import types
from typing import Any

import torch
from torch import Tensor, _subclasses, nn
from torch.utils import _python_dispatch

from perl.private.checked import need

need(_subclasses, "FakeTensor", "FakeTensorMode")
need(_python_dispatch, "TorchDispatchMode")
need(nn.Module(), "_apply", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")

FakeTensor = _subclasses.FakeTensor
"""A tensor without contents."""
FakeTensorMode = _subclasses.FakeTensorMode
"""Inside, operations make fake tensors."""


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every operation can be watched. Torch's guard against dynamo, slow in each, is left out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


HAS_PACKED_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch multiplies with oneDNN's packed weights; not every one does."""
if HAS_PACKED_LINEAR:
    need(torch.ops.mkldnn, "_reorder_linear_weight", "_is_mkldnn_bf16_supported")

PACKED_LINEAR: Any = torch.ops.mkldnn._linear_pointwise if HAS_PACKED_LINEAR else None
"""The operator that multiplies with packed weights."""
PACKS_BF16 = HAS_PACKED_LINEAR and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether torch was built with oneDNN, and this CPU multiplies bf16."""

_ATEN = torch.ops.aten
need(
    _ATEN,
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_local_scalar_dense",
)
need(_ATEN.mm.default, "_overloadpacket", "_schema")
FLASH_ATTENTION: Any = _ATEN._scaled_dot_product_flash_attention
FLASH_ATTENTION_BACKWARD: Any = _ATEN._scaled_dot_product_flash_attention_backward
CPU_ATTENTION: Any = _ATEN._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD: Any = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
ITEM: Any = _ATEN._local_scalar_dense.default
"""The operator behind `Tensor.item`."""

need(torch._C, "_current_graph_task_id")


def in_backward() -> bool:
    """Whether autograd's engine runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def packed_weight(weight_OI: Tensor) -> Tensor:
    """A bf16 weight in oneDNN's own order, for `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return packed


def packed_linear(x: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The product x Wᵀ + bias (..., O), with W from `packed_weight`."""
    product: Tensor = PACKED_LINEAR(x, packed_OI, bias_O, "none", [], "")
    return product


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def operator_of(overload: Any) -> Any:
    """The operator that an overload belongs to, such as `aten.mm` of `aten.mm.default`."""
    return overload._overloadpacket


@functools.cache
def returns_view(overload: Any) -> bool:
    """Whether an operator's result shares an argument's memory without writing to it."""
    aliases = [one.alias_info for one in overload._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def keep_in_place(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` of a module whose tensors are neither moved nor converted."""
    return module


def forbid_conversion(module: nn.Module) -> None:
    """Let `to`, `float` and the like do nothing on a module."""
    vars(module)["_apply"] = types.MethodType(keep_in_place, module)


class Unconverted(nn.Module):
    """A module on which `to`, `float` and the like do nothing; first of a class's bases."""

    _apply = keep_in_place
