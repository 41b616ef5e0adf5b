"""Where memory goes: the peak of each phase, and what the bytes were for at that moment.

On a CPU a `Timeline` keeps every change of the live bytes, so that the composition of each peak is exact, also of
bytes whose kind is known only later (a gradient is born as a temporary). On CUDA the allocator's own peak is
read, which costs nothing; what is not marked there counts as activations.
"""

from array import array
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from perl.measure.memory import LiveBytes, holder
from perl.measure.probe import KINDS, PHASES, Kind, Listener, Phase, PhaseMemory


class Timeline(LiveBytes, Listener):  # type: ignore[no-untyped-call]
    """Live tensor bytes over time.

    Args:
        resident: tensors alive already that count, by what they are for: the phase `load`.
    """

    def __init__(self, resident: Mapping[Kind, Iterable[Tensor]]) -> None:
        super().__init__()
        self._serials: dict[int, int] = {}  # by the storage's key, which another storage may have later
        self._kind_of: dict[int, Kind] = {}
        self._storages, self._changes = array("q"), array("q")
        self._starts: list[tuple[int, Phase]] = [(0, "load")]
        self._next = 0
        for kind, tensors in resident.items():
            self.mark(kind, tensors)
        self._peak = self._current

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """These tensors are of this kind, from their birth on; those from before are counted from now on."""
        for tensor in tensors:
            storage = holder(tensor)
            assert storage is not None, "sparse"
            if id(storage) not in self._sizes:
                self._count(storage)
            self._kind_of[self._serials[id(storage)]] = kind

    def phase(self, name: Phase) -> None:
        """What is done from now on."""
        self._starts.append((len(self._changes), name))

    def memory(self) -> dict[Phase, PhaseMemory]:
        """The peaks of the phases seen so far."""
        changes, storages = np.array(self._changes), np.array(self._storages)
        level = np.concatenate([[0], changes.cumsum()])  # level[i]: after i changes
        kind_of = np.full(self._next, KINDS.index("activations"))
        for serial, kind in self._kind_of.items():
            kind_of[serial] = KINDS.index(kind)
        peaks: dict[Phase, int] = {}  # the number of changes until then
        ends = [start for start, _ in self._starts[1:]] + [len(changes)]
        for (start, name), end in zip(self._starts, ends, strict=True):
            moment = start + int(level[start : end + 1].argmax())
            if name not in peaks or level[moment] > level[peaks[name]]:
                peaks[name] = moment
        memory: dict[Phase, PhaseMemory] = {}
        for name in (phase for phase in PHASES if phase in peaks):
            sums, moment = np.zeros(len(KINDS), dtype=np.int64), peaks[name]
            np.add.at(sums, kind_of[storages[:moment]], changes[:moment])
            kinds = {kind: int(count) for kind, count in zip(KINDS, sums, strict=True) if count}
            memory[name] = PhaseMemory(int(level[moment]), kinds)
        return memory

    def _change(self, key: int, by: int) -> None:
        super()._change(key, by)
        serial = self._serials.setdefault(key, self._next)
        self._next = max(self._next, serial + 1)
        if key not in self._sizes:
            del self._serials[key]
        self._storages.append(serial)
        self._changes.append(by)


class Allocator(AbstractContextManager[None], Listener):
    """The CUDA allocator's peaks by phase, with the bytes of marked tensors as they were last marked.

    Args:
        device: a CUDA device.
        resident: tensors by what they are for.
    """

    def __init__(self, device: torch.device, resident: Mapping[Kind, Iterable[Tensor]]) -> None:
        self._device = device
        self._bytes: dict[Kind, int] = {}
        self._memory: dict[Phase, PhaseMemory] = {}
        self._phase: Phase = "load"
        for kind, tensors in resident.items():
            self.mark(kind, tensors)

    def __exit__(self, *error: object) -> None:
        """The allocator counts all the time: nothing begins or ends."""

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """These are all tensors of this kind."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self._bytes[kind] = sum(storages.values())

    def phase(self, name: Phase) -> None:
        """Note the peak of what ends, and begin another."""
        self._note()
        self._phase = name
        torch.cuda.reset_peak_memory_stats(self._device)

    def memory(self) -> dict[Phase, PhaseMemory]:
        """The peaks of the phases seen so far."""
        self._note()
        return {name: self._memory[name] for name in PHASES if name in self._memory}

    def _note(self) -> None:
        peak = torch.cuda.max_memory_allocated(self._device)
        if self._phase in self._memory and peak <= self._memory[self._phase].peak:
            return
        # A phase has no use for what only another one holds.
        absent: dict[Phase, tuple[Kind, ...]] = {
            "load": ("gradients", "optimizer", "kv_cache"),
            "generate": ("gradients",),
            "score": ("gradients", "kv_cache"),
            "update": ("kv_cache",),
        }
        kinds = {kind: count for kind, count in self._bytes.items() if kind not in absent[self._phase]}
        kinds["activations"] = max(0, peak - sum(kinds.values()))
        self._memory[self._phase] = PhaseMemory(peak, kinds)
