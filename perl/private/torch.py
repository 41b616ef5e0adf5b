"""The private interfaces of torch that PERL uses."""

import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, _subclasses, nn
from torch.utils import _python_dispatch

from perl.private.checked import need

need(_subclasses, "FakeTensor", "FakeTensorMode")
need(_python_dispatch, "TorchDispatchMode")
need(nn.Module(), "_apply", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")

FakeTensor = _subclasses.FakeTensor
"""A tensor without data."""
FakeTensorMode = _subclasses.FakeTensorMode
"""Context in which operations create fake tensors."""


class Observer(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that observes every operation. It skips torch's guard against dynamo, which is slow in each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and observe it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.observe(func, args, kwargs, result)
        return result

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Take note of an operator that has run."""
        raise NotImplementedError


HAS_PACKED_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch supports products with oneDNN's packed weights; not every build does."""
if HAS_PACKED_LINEAR:
    need(torch.ops.mkldnn, "_reorder_linear_weight", "_is_mkldnn_bf16_supported")

PACKED_LINEAR: Any = torch.ops.mkldnn._linear_pointwise if HAS_PACKED_LINEAR else None
"""The operator for products with packed weights."""
PACKS_BF16 = HAS_PACKED_LINEAR and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether torch was built with oneDNN and this CPU supports bf16 products."""

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
    """Return whether autograd's engine is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def packed_weight(weight_OI: Tensor) -> Tensor:
    """Return a bf16 weight in oneDNN's own layout, for `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return packed


def packed_linear(x: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Compute x Wᵀ + bias (..., O), with W from `packed_weight`."""
    product: Tensor = PACKED_LINEAR(x, packed_OI, bias_O, "none", [], "")
    return product


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def operator_of(overload: Any) -> Any:
    """Return the operator that an overload belongs to, such as `aten.mm` for `aten.mm.default`."""
    return overload._overloadpacket


@functools.cache
def returns_view(overload: Any) -> bool:
    """Return whether an operator's result shares an argument's memory without writing to it."""
    aliases = [one.alias_info for one in overload._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def keep_in_place(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """Replace `nn.Module._apply` with this to prevent moving or converting a module's tensors."""
    return module


def forbid_conversion(module: nn.Module) -> None:
    """Make `to`, `float` and similar methods do nothing on a module."""
    vars(module)["_apply"] = types.MethodType(keep_in_place, module)


class Unconverted(nn.Module):
    """Mixin on which `to`, `float` and similar methods do nothing; must be the first base class."""

    _apply = keep_in_place
