"""A GPU simulated on the CPU: tensors on `cuda` with their contents on the CPU, and a count of the host's waits.

Values are real, so a whole run gives the same results as on a CPU; operators on tensors of different devices fail
as in CUDA. In torch's C++ the tensors are on `meta`, the only device besides the CPU on which a build without CUDA
can compute gradients; in Python they are on `cuda`. Kernels are the CPU's: speed, memory and CUDA's rounding are
not simulated.
"""

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten
COUNTS = frozenset(
    {
        aten._local_scalar_dense.default,
        aten.equal.default,
        aten.masked_select.default,
        aten.nonzero.default,
        aten._unique2.default,
        aten.unique_consecutive.default,
        aten.unique_dim.default,
    }
)
"""Operators whose result, or its size, the host must have before it continues."""
INDEX = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
)


class Waits(Counter[str]):
    """How often the host waited for the GPU, by place."""

    def note(self, what: str) -> None:
        """Count a wait at the line of the package, or else of the library, that caused it."""
        frames = [one for one in reversed(traceback.extract_stack()) if "/torch/" not in one.filename]
        at = next((one for one in frames if "/perl/" in one.filename), frames[-1])
        self[f"{what} at {at.filename.rpartition('/perl/')[2]}:{at.lineno}: {at.line}"] += 1


_waits: list[Waits] = []
"""The current count."""


class OnGpu(Tensor):
    """A tensor on the simulated GPU, with its contents in `held`."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type["OnGpu"], held: Tensor) -> "OnGpu":
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: OnGpu = Tensor._make_wrapper_subclass(cls, held.shape, device=META, **shape)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "OnGpu") -> None:
        assert other.dtype == self.dtype, f"from {self.dtype} to {other.dtype}"
        self.held = other.held

    def __getitem__(self, places: Any) -> Tensor:
        return super().__getitem__(_listed(places))

    def __setitem__(self, places: Any, value: Any) -> None:
        super().__setitem__(_listed(places), value)

    def tolist(self) -> Any:
        note("tolist")
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGpu":
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], _: None, size: Any, stride: Any) -> "OnGpu":
        return OnGpu(inner["held"])


def _listed(places: Any) -> Any:
    """Convert lists to tensors as torch does; on meta these would have no contents."""
    if isinstance(places, list | range):
        return torch.tensor(list(places), dtype=None if len(places) else torch.int64)
    return tuple(map(_listed, places)) if isinstance(places, tuple) else places


def note(what: str) -> None:
    for waits in _waits:
        waits.note(what)


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the contents; its results are on the GPU where CUDA's would be.

    Raises:
        RuntimeError: the tensors are on different devices.
    """
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    given = [one for one in tensors if isinstance(one, OnGpu)]
    device = kwargs.get("device")
    on_gpu = bool(given) if device is None else torch.device(device).type != "cpu"
    if given:
        _check_devices(func, args, tensors)
        if func in COUNTS or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            note(func.__name__)
    if func is aten._to_copy.default and on_gpu != bool(given) and not (on_gpu and kwargs.get("non_blocking")):
        note("to the GPU" if on_gpu else "to the CPU")
    result = func(*tree_map(_lowered, args), **tree_map(_lowered, kwargs))
    if not on_gpu:
        return result
    same = {id(one.held): one for one in given}  # in place, or written to `out`
    return tree_map(lambda one: _raised(one, same) if isinstance(one, Tensor) else one, result)


def _raised(held: Tensor, same: Mapping[int, OnGpu]) -> OnGpu:
    return same[id(held)] if id(held) in same else OnGpu(held)


def _lowered(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.held
    return CPU if isinstance(value, torch.device) else value


def _check_devices(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Allow the CPU tensors that CUDA allows: scalars, indices and copies, for which the host waits."""
    here = [one for one in tensors if not isinstance(one, OnGpu) and one.dim()]
    if func is aten.copy_.default:
        if here or not isinstance(args[0], OnGpu):
            note("copied")
        return
    if func in INDEX:
        places = [one for one in args[1] if one is not None]
        if any(one.dtype in (torch.bool, torch.uint8) for one in places):
            note("a boolean index")
        if any(not isinstance(one, OnGpu) for one in places):
            note("an index to the GPU")
        here = [one for one in (args[0], *args[2:3]) if not isinstance(one, OnGpu) and one.dim()]
    if here and func is not aten._to_copy.default:
        raise RuntimeError(f"{func}: tensors on cuda and on the CPU {[tuple(one.shape) for one in here]}")


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def _is_cuda(value: Any) -> bool:
    name = value.type if isinstance(value, torch.device) else value
    return isinstance(name, str) and name.partition(":")[0] == "cuda"


class _Names(TorchFunctionMode):
    """Replaces the device `cuda` in Python by `meta` underneath."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device or not any(map(_is_cuda, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):  # on meta it would have no contents
            del kwargs["device"]
            return func(*args, **kwargs).to(META)
        named = {key: META if _is_cuda(value) else value for key, value in kwargs.items()}
        return func(*(META if _is_cuda(one) else one for one in args), **named)


class _Generator(torch.Generator):
    """The GPU's generator, which draws the same numbers as the CPU's."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._named = torch.device(device)

    device = property(lambda self: self._named)  # type: ignore[assignment]

    def manual_seed(self, seed: int) -> "_Generator":
        super().manual_seed(seed)
        return self


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Waits]:
    """Simulate a GPU inside this context; yield the count of the host's waits."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "set_device": lambda _: None,
        "get_rng_state_all": lambda: [],
        "set_rng_state_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda: None,
        "get_device_name": lambda *_: "a pretended GPU",
        "get_device_capability": lambda *_: (9, 0),
        "manual_seed_all": lambda _: None,
        "manual_seed": lambda _: None,
    }
    waits = Waits()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(_Names())
        stack.enter_context(_Dispatch())  # type: ignore[no-untyped-call]
        _waits.append(waits)
        stack.callback(_waits.remove, waits)
        yield waits
