"""Notifications from running code to the listeners that measure it: kinds of tensors, and recomputation."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor  # results are read without torch

Kind = Literal["base_weights", "adapters", "gradients", "optimizer", "kv_cache", "activations"]
"""Kinds of bytes. Adapters include their heads; activations are everything else, including temporaries."""
Phase = Literal["load", "generate", "score", "update"]
"""Phases: before the first step; sampling; rewards, reference and values; forward, backward and optimizer."""
KINDS: tuple[Kind, ...] = get_args(Kind)
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class PhaseMemory:
    """The peak of a phase in bytes, and the bytes by kind, which add up to the peak."""

    peak: int
    kinds: dict[Kind, int]


def highest(memories: Iterable[Mapping[Phase, PhaseMemory]]) -> dict[Phase, PhaseMemory]:
    """Return the highest peak of each phase that occurs; the first of equal ones."""
    found: dict[Phase, PhaseMemory] = {}
    for memory in memories:
        for phase, one in memory.items():
            if phase not in found or one.peak > found[phase].peak:
                found[phase] = one
    return {phase: found[phase] for phase in PHASES if phase in found}


class Listener:
    """Receives notifications; subclasses override the methods that they need."""

    def mark(self, kind: Kind, tensors: "Iterable[Tensor]") -> None:
        """Note the kind of these tensors."""

    def recomputing(self, begins: bool) -> None:
        """Note that recomputation of activations begins or ends."""


listeners: list[Listener] = []


def mark(kind: Kind, tensors: "Iterable[Tensor]") -> None:
    """Tell the listeners the kind of tensors."""
    if listeners:
        tensors = list(tensors)
        for listener in listeners:
            listener.mark(kind, tensors)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Tell the listeners that activations are recomputed for the backward pass inside the block."""
    for listener in listeners:
        listener.recomputing(True)
    try:
        yield
    finally:
        for listener in listeners:
            listener.recomputing(False)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Notify the listener inside the block."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
