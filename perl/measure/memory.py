"""Live tensor bytes, which a CPU run reports as its memory, and the process's RSS.

Live bytes are exactly reproducible; RSS depends on what the C allocator kept from earlier. Torch's own
`torch.distributed._tools.mem_tracker.MemTracker` fails on parameters that do not require grad, such as the base's.

Not counted: scratch space inside a kernel, tensors of subclasses that wrap others (DTensor), code under
`torch.compile`, other threads, and `untyped_storage().resize_` until the next operation returns the storage.
"""

import gc
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from perl.private.torch import Observer


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or results, which may be lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


Holder = torch.UntypedStorage | Tensor
"""Owner of bytes: a storage, or a tensor in oneDNN's layout, which has no storage."""


def holder(tensor: Tensor) -> Holder | None:
    """Return the owner of the tensor's bytes; None for sparse layouts, which have no single owner."""
    if tensor.layout is torch.strided:
        return tensor.untyped_storage()
    return tensor if tensor.is_mkldnn else None


class LiveBytes(Observer):
    """Counts the bytes of tensor storages created while active, and their peak, on any device.

    A storage counts once, regardless of its views, from the operator that creates it until it is freed, which is
    noticed at once, even outside the mode. Older storages count only if they are given. The backward pass of a CPU
    graph runs in the thread that called it, and is counted.

    The counts of a program are exactly reproducible, unless it drops tensors in reference cycles, which live until
    Python's collector runs. Entering collects garbage once, so that the collector runs at the same points.

    Args:
        start: existing tensors that are counted, such as a model's parameters and buffers.

    Attributes:
        current: live bytes now.
        peak: the largest number of live bytes so far.
    """

    def __init__(self, start: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Holder]] = {}
        self.current = 0
        for tensor in start:
            if (storage := holder(tensor)) is not None:
                self._count(storage)
        self.peak = self.current

    def __enter__(self) -> "LiveBytes":
        gc.collect()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Count the storages that the operator created."""
        # A fake result is a different object from the `out` tensor.
        for tensor in tensors_in((kwargs.get("out", result),)):
            storage = holder(tensor)
            # Views and in-place operators return their argument's storage, which is not new but may be resized.
            if storage is not None and (
                id(storage) in self._sizes or not self._is_from_before(storage, func, args, kwargs)
            ):
                self._count(storage)
        self.peak = max(self.peak, self.current)

    def _is_from_before(
        self, storage: Holder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Return whether an uncounted storage was among the operator's arguments."""
        # torch.tensor and from_numpy create their tensor unnoticed and then pass it through lift_fresh.
        if func is torch.ops.aten.lift_fresh.default:
            return False
        return any(holder(tensor) is storage for tensor in tensors_in((*args, *kwargs.values())))

    def _count(self, storage: Holder) -> None:
        """Add a storage or record its new size. A storage has one Python object for life, so its id is a key."""
        key, size = id(storage), storage.nbytes if isinstance(storage, Tensor) else storage.nbytes()
        if key not in self._sizes:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        before, self._sizes[key] = self._sizes.get(key, 0), size
        self._change(key, size - before)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self._change(key, -self._sizes.pop(key))

    def _change(self, key: int, by: int) -> None:
        """Change the live bytes by those of a storage; a forgotten storage has no size any more."""
        self.current += by


def peak_rss_bytes() -> int:
    """Return the largest physical memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
