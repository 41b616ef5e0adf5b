"""Memory by phase: the peak of each phase and its composition by kind.

On a CPU a `Timeline` records every change of the live bytes, so that the composition of a peak is exact even for
bytes whose kind is known only later, such as gradients. On CUDA the allocator's own peak is read, which costs
nothing; unmarked bytes count as activations.
"""

from array import array
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perl.measure.memory import LiveBytes, holder
from perl.measure.probe import KINDS, PHASES, Kind, Listener, Phase, PhaseMemory, highest

ABSENT: dict[Phase, tuple[Kind, ...]] = {
    "load": ("gradients", "optimizer", "kv_cache"),
    "generate": ("gradients",),
    "score": ("gradients", "kv_cache"),
    "update": ("kv_cache",),
}
"""The kinds that a phase does not hold, even if they were marked in another phase."""


class Timeline(LiveBytes, Listener):  # type: ignore[no-untyped-call]
    """Live tensor bytes over time.

    Args:
        resident: tensors that are already alive and counted, by kind, in the phase `load`.
    """

    def __init__(self, resident: Mapping[Kind, Iterable[Tensor]]) -> None:
        super().__init__()
        self._serials: dict[int, int] = {}  # by the storage's key, which another storage may get later
        self._kind_of: dict[int, Kind] = {}
        self._storages, self._changes = array("q"), array("q")
        self._starts: list[tuple[int, Phase]] = [(0, "load")]
        self._next = 0
        for kind, tensors in resident.items():
            self.mark(kind, tensors)
        self.peak = self.current

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Set the kind of tensors for their whole life; tensors created earlier are counted from now on."""
        for tensor in tensors:
            storage = holder(tensor)
            assert storage is not None, "sparse"
            if id(storage) not in self._sizes:
                self._count(storage)
            self._kind_of[self._serials[id(storage)]] = kind

    def phase(self, name: Phase) -> None:
        """Start a phase."""
        self._starts.append((len(self._changes), name))

    def memory(self) -> dict[Phase, PhaseMemory]:
        """Return the peaks of the phases so far."""
        return highest(self.around_gradients())

    def around_gradients(self) -> tuple[dict[Phase, PhaseMemory], dict[Phase, PhaseMemory]]:
        """Return the phases' peaks before all gradients exist, and while all of them do."""
        changes, storages = np.array(self._changes, dtype=np.int64), np.array(self._storages, dtype=np.int64)
        kind_of = np.full(self._next, KINDS.index("activations"))
        for serial, kind in self._kind_of.items():
            kind_of[serial] = KINDS.index(kind)
        of_gradients = np.where(kind_of[storages] == KINDS.index("gradients"), changes, 0)
        # Live bytes after each number of changes.
        level, gradients = (np.concatenate([[0], found.cumsum()]) for found in (changes, of_gradients))
        complete = gradients == gradients.max()
        there = [np.where(when, level, -1) for when in (~complete, complete)]
        before, after = (self._peaks(level, kind_of[storages], changes) for level in there)
        return before, after

    def _peaks(
        self, level: NDArray[np.int64], kinds_of: NDArray[np.int64], changes: NDArray[np.int64]
    ) -> dict[Phase, PhaseMemory]:
        """Return the peaks of the phases.

        Args:
            level: live bytes after each number of changes, -1 where they are ignored.
            kinds_of: the kind of each change's bytes.
        """
        peaks: dict[Phase, int] = {}  # the number of changes until then
        ends = [start for start, _ in self._starts[1:]] + [len(changes)]
        for (start, name), end in zip(self._starts, ends, strict=True):
            moment = start + int(level[start : end + 1].argmax())
            if level[moment] >= 0 and (name not in peaks or level[moment] > level[peaks[name]]):
                peaks[name] = moment
        memory: dict[Phase, PhaseMemory] = {}
        for name in (phase for phase in PHASES if phase in peaks):
            sums, moment = np.zeros(len(KINDS), dtype=np.int64), peaks[name]
            np.add.at(sums, kinds_of[:moment], changes[:moment])
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
    """The CUDA allocator's peaks by phase, with the last marked bytes of each kind.

    Args:
        resident: tensors that are already alive, by kind.
    """

    def __init__(self, device: torch.device, resident: Mapping[Kind, Iterable[Tensor]]) -> None:
        self._device = device
        self._bytes: dict[Kind, int] = {}
        self._memory: dict[Phase, PhaseMemory] = {}
        self._phase: Phase = "load"
        for kind, tensors in resident.items():
            self.mark(kind, tensors)

    def __exit__(self, *error: object) -> None:
        """Do nothing: the allocator always counts."""

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Set all tensors of a kind."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self._bytes[kind] = sum(storages.values())

    def phase(self, name: Phase) -> None:
        """Record the peak of the current phase, and start another."""
        self._note()
        self._phase = name
        torch.cuda.reset_peak_memory_stats(self._device)

    def memory(self) -> dict[Phase, PhaseMemory]:
        """Return the peaks of the phases so far."""
        self._note()
        return {name: self._memory[name] for name in PHASES if name in self._memory}

    def _note(self) -> None:
        peak = torch.cuda.max_memory_allocated(self._device)
        if self._phase in self._memory and peak <= self._memory[self._phase].peak:
            return
        kinds = {kind: count for kind, count in self._bytes.items() if kind not in ABSENT[self._phase]}
        kinds["activations"] = max(0, peak - sum(kinds.values()))
        self._memory[self._phase] = PhaseMemory(peak, kinds)
