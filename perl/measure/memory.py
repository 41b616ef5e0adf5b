"""Live tensor bytes, what a CPU run reports as its memory; and the process's RSS beside them.

RSS cannot be repeated: it depends on what the C allocator kept from before. The bytes of live tensors can.

`torch.distributed._tools.mem_tracker.MemTracker`, torch's own tool for this, cannot be used: it fails on
parameters that do not require grad, and here that is the whole base.

What is not seen: scratch space inside one kernel, tensors of subclasses that wrap others (DTensor), code
under `torch.compile`, other threads, and storages resized by `untyped_storage().resize_` until the next
operation that returns them.
"""

import gc
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which nest lists at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


Holder = torch.UntypedStorage | Tensor
"""What bytes are held by: a storage, or a tensor in oneDNN's own order, which has none."""


def holder(tensor: Tensor) -> Holder | None:
    """What holds the tensor's bytes; None for layouts (sparse) that have no one holder."""
    if tensor.layout is torch.strided:
        return tensor.untyped_storage()
    return tensor if tensor.is_mkldnn else None


def _size(held_by: Holder) -> int:
    return held_by.nbytes if isinstance(held_by, Tensor) else held_by.nbytes()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages made while active, and their peak; of any device.

    A storage counts once, however many views it has, from the operator that made it until it is freed: it
    is held by weak reference only. Storages from before count if they are given, and otherwise never. Freed
    storages are noticed at once, also outside the mode. The backward of a CPU graph runs in the thread that
    called it, so gradients and what it recomputes are counted as well.

    The counts of one program repeat exactly, unless it drops tensors in reference cycles: those live on until
    Python's collector comes by. Entering collects once, so that it comes by at the same points.

    Args:
        start: tensors alive already that are to count, such as a model's parameters and buffers.
    """

    def __init__(self, start: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Holder]] = {}
        self._current = 0
        for tensor in start:
            if (storage := holder(tensor)) is not None:
                self._count(storage)
        self._peak = self._current

    @property
    def current(self) -> int:
        """Bytes alive now."""
        return self._current

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once, since the start or the last `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        """Begin a new peak from what is alive now."""
        self._peak = self._current

    def __enter__(self) -> "LiveBytes":
        gc.collect()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and count the storages it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # A fake result is another object than the `out` it was written to.
        for tensor in _tensors((kwargs.get("out", result),)):
            storage = holder(tensor)
            # Views and in-place operators return their argument's storage: not new, though maybe resized.
            if storage is not None and (
                id(storage) in self._sizes or not self._is_from_before(storage, func, args, kwargs)
            ):
                self._count(storage)
        self._peak = max(self._peak, self._current)
        return result

    def _is_from_before(
        self, storage: Holder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether an uncounted storage came in with the operator's arguments."""
        # torch.tensor and from_numpy make their tensor unseen and then pass it through lift_fresh.
        if func is torch.ops.aten.lift_fresh.default:
            return False
        return any(holder(tensor) is storage for tensor in _tensors((*args, *kwargs.values())))

    def _count(self, storage: Holder) -> None:
        """Add a storage, or note its new size. A storage has one Python object for life: its id is a key."""
        key, size = id(storage), _size(storage)
        if key not in self._sizes:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        before, self._sizes[key] = self._sizes.get(key, 0), size
        self._change(key, size - before)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self._change(key, -self._sizes.pop(key))

    def _change(self, key: int, by: int) -> None:
        """So many bytes more of a storage; when it is forgotten, it has no size any more."""
        self._current += by


def peak_rss_bytes() -> int:
    """The most physical memory this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
