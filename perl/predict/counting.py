"""The operations of a step by phase: what each computes, reads and writes, counted on fake or real tensors.

Operations are counted at torch's kernels, below autograd: so a frozen weight has no gradient, and a checkpointed
block has a second forward. If only parts of a step are run, each counts as often as it occurs in the whole step.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from perl.measure.flops import FORMULAS
from perl.measure.ledger import Timeline
from perl.measure.memory import tensors_in
from perl.measure.meter import Meter
from perl.measure.probe import Phase, PhaseMemory
from perl.private.torch import ITEM, Observer, in_backward, operator_of, returns_view

Kind = Literal["product", "rows", "rank", "cache", "attention", "exponential", "other"]
"""Matrix products; products with few rows, of low rank, and of one row with each sequence's cache, which take the
time of reading their larger factor; fused attention; functions with many instructions per element; the rest."""
Issuer = Literal["model", "training", "backward"]
"""The caller of a kernel: Python without gradients, Python with gradients, or autograd's engine."""

THIN = 32
"""A product with a side of at most this size is thin: one token per row, or a low rank."""
_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm: (0, 1), _ATEN.addmm: (1, 2), _ATEN.addmm_: (1, 2), _ATEN.bmm: (0, 1), _ATEN.baddbmm: (1, 2)}
"""The argument positions of each product's two factors."""
_EXPONENTIAL = ("exp", "log", "softmax", "silu", "gelu", "sigmoid", "tanh", "pow", "erf", "cumsum", "searchsorted")
_GATHERED = ("embedding", "index", "index_select", "gather")
"""Operations that read no more of their first argument than they return."""


@dataclass(frozen=True)
class Operation:
    """One call of a kernel; equal calls in a step are counted together."""

    kind: Kind
    dtype: str
    """The dtype of the computation, such as `float32`: the widest of its arguments."""
    flops: int
    """A multiply-add counts as two; 0 if only bytes matter."""
    bytes: int
    """Bytes read and written; 0 for views."""
    issuer: Issuer


Work = dict[Operation, float]
"""How often each operation occurs in a step."""


class CountingMeter(Meter):
    """A meter that also counts operations.

    Attributes:
        repeats: by phase, how often the operations running now occur in the step; 1 by default.
    """

    def __init__(self, *args: Any) -> None:
        self.repeats: dict[Phase, float] = {}
        self._work: dict[Phase, Work] = {}
        self._now: list[Phase] = []
        super().__init__(*args)

    @contextlib.contextmanager
    def step(self, optimizer: Any) -> Iterator[None]:
        """Do as `Meter.step`, and count operations."""
        with super().step(optimizer), _Counting(self._count):
            yield

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Do as `Meter.phase`, and attribute operations to the phase."""
        self._now.append(name)
        try:
            with super().phase(name):
                yield
        finally:
            self._now.pop()

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Count every operation inside the context once."""
        before, self.repeats = self.repeats, {}
        try:
            yield
        finally:
            self.repeats = before

    def around_gradients(self) -> tuple[dict[Phase, PhaseMemory], dict[Phase, PhaseMemory]]:
        """See `Timeline`."""
        assert isinstance(self._ledger, Timeline)
        return self._ledger.around_gradients()

    def work(self) -> dict[Phase, Work]:
        """Return the work of a step by phase, averaged over steps, as batches have different lengths."""
        return {phase: scaled(work, 1 / len(self.step_seconds)) for phase, work in self._work.items()}

    def _count(self, operation: Operation) -> None:
        phase = self._now[-1]
        work = self._work.setdefault(phase, {})
        work[operation] = work.get(operation, 0.0) + self.repeats.get(phase, 1.0)


@contextlib.contextmanager
def counted() -> Iterator[Work]:
    """Count the operations inside the context; `CountingMeter` also separates phases."""
    work: Counter[Operation] = Counter()
    with _Counting(lambda operation: work.update([operation])):
        yield work  # type: ignore[misc]


class _Counting(Observer):  # type: ignore[no-untyped-call]
    def __init__(self, count: Callable[[Operation], None]) -> None:
        super().__init__()
        self._count = count

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if func.namespace != "prim" and func is not ITEM:  # these are queries, not work
            self._count(operation_of(func, args, kwargs, result))


def operation_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Operation:
    """Describe a call of a kernel."""
    issuer: Issuer = "training" if torch.is_grad_enabled() else "backward" if in_backward() else "model"
    returned = list(tensors_in((result,)))
    read = list(tensors_in((*args, *kwargs.values())))
    dtypes = [one.dtype for one in (*read, *returned) if one.dtype.is_floating_point]
    dtype = str(max(dtypes, key=lambda one: one.itemsize, default=torch.float32)).removeprefix("torch.")
    if returns_view(func):
        return Operation("other", dtype, 0, 0, issuer)
    packet = operator_of(func)
    name = packet.__name__.strip("_")
    if name in _GATHERED and returned:
        read = [*returned, *read[1:]]
    size = sum(map(_bytes, read)) + sum(map(_bytes, returned))
    if (formula := FORMULAS.get(packet)) is not None:
        flops = int(formula(*args, **kwargs, out_val=result))
        return Operation(_product_kind(packet, args), dtype, flops, size, issuer)
    exponential = any(part in name for part in _EXPONENTIAL)
    return Operation("exponential" if exponential else "other", dtype, 0, size, issuer)


def _product_kind(packet: Any, args: tuple[Any, ...]) -> Kind:
    if "attention" in packet.__name__:
        return "attention"
    if packet not in _PRODUCTS:
        return "product"
    left, right = (args[place].shape for place in _PRODUCTS[packet])
    if min(*left[-2:], right[-1]) > THIN:
        return "product"
    return "cache" if len(left) == 3 else "rows" if left[0] <= THIN < min(right) else "rank"


def _bytes(tensor: Tensor) -> int:
    """Return the bytes read of a tensor: an expanded one is smaller than its shape."""
    count = tensor.numel() * tensor.itemsize
    return min(count, tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else count


def scaled(work: Work, factor: float) -> Work:
    """Multiply the work by a factor."""
    return {operation: count * factor for operation, count in work.items()}


def added(*works: Work) -> Work:
    """Return the sum of the work."""
    total: Work = {}
    for work in works:
        for operation, count in work.items():
            total[operation] = total.get(operation, 0.0) + count
    return total
