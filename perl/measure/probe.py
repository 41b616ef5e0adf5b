"""What running code tells the listeners that measure it: what its tensors are for, and when it recomputes."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor  # results are read without torch

Kind = Literal["base_weights", "adapters", "gradients", "optimizer", "kv_cache", "activations"]
"""What bytes are for. Adapters include their heads; activations are all that is nothing else, temporaries too."""
Phase = Literal["load", "generate", "score", "update"]
"""Before the first step; sampling; rewards, reference and values; forward, backward and optimizer."""
KINDS: tuple[Kind, ...] = get_args(Kind)
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class PhaseMemory:
    """The peak of a phase in bytes, and what these were for: the kinds add up to the peak."""

    peak: int
    kinds: dict[Kind, int]


def highest(memories: Iterable[Mapping[Phase, PhaseMemory]]) -> dict[Phase, PhaseMemory]:
    """Of each phase that one of them has, the highest peak; the first where several are alike."""
    found: dict[Phase, PhaseMemory] = {}
    for memory in memories:
        for phase, one in memory.items():
            if phase not in found or one.peak > found[phase].peak:
                found[phase] = one
    return {phase: found[phase] for phase in PHASES if phase in found}


class Listener:
    """Told what runs; a subclass overrides what it is concerned with."""

    def mark(self, kind: Kind, tensors: "Iterable[Tensor]") -> None:
        """These tensors are of this kind."""

    def recomputing(self, begins: bool) -> None:
        """From now on, activations are computed again; or no longer."""


listeners: list[Listener] = []


def mark(kind: Kind, tensors: "Iterable[Tensor]") -> None:
    """Say what tensors are for."""
    if listeners:
        tensors = list(tensors)
        for listener in listeners:
            listener.mark(kind, tensors)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Inside, activations are computed again for the backward pass."""
    for listener in listeners:
        listener.recomputing(True)
    try:
        yield
    finally:
        for listener in listeners:
            listener.recomputing(False)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, the listener is told."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
