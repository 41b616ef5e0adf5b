"""What running code tells its listeners, who measure it; nobody listening, it costs a look at an empty list.

The code that runs marks its tensors and names what it does; listeners put that together with what they see.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor  # results are read without torch

Kind = Literal["base_weights", "adapters", "gradients", "optimizer", "kv_cache", "activations"]
"""What bytes are for. Adapters: with their heads. Activations: whatever is nothing else, temporaries too."""
Phase = Literal["load", "generate", "score", "update"]
"""When: before the first step; sampling; reading rewards, reference and values; forward, backward, optimizer."""
KINDS: tuple[Kind, ...] = get_args(Kind)
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class PhaseMemory:
    """The peak of a phase, in bytes."""

    peak: int
    kinds: dict[Kind, int]
    """What it was made of; the sum is the peak."""


class Listener:
    """Told what runs; each kind of listener overrides what it is concerned with."""

    def mark(self, kind: Kind, tensors: "Iterable[Tensor]") -> None:
        """These tensors are of this kind."""

    def phase(self, name: Phase) -> None:
        """What is done from now on."""

    def recomputing(self, begins: bool) -> None:
        """Whether what is computed from now on was computed before."""


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
    """Inside, the listener hears."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
