"""What a stage costs: seconds, tokens, and the peak of its memory."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from perl.measure.memory import measure_peak, peak_rss_bytes

MEASURED_STEPS = 2
"""Live bytes are tracked on the first steps only, on CPU: the tracker slows small models by up to 2.4 times."""


class Meter:
    """Counts a stage's time and tokens, and measures the memory of its first steps (on CUDA, of them all).

    Args:
        device: where the work is done.
        tensors: gives the tensors that live through the whole stage, such as the base's weights.
    """

    def __init__(self, device: torch.device, tensors: Callable[[], list[Tensor]]) -> None:
        self._device, self._tensors = device, tensors
        self._steps = 0
        self._seconds = 0.0
        self._tokens = 0
        self._peak = 0

    @contextlib.contextmanager
    def step(self) -> Iterator[Callable[[int], None]]:
        """Measure one step; what it yields counts the step's tokens."""
        begin = time.perf_counter()
        if self._steps < MEASURED_STEPS or self._device.type == "cuda":
            with measure_peak(self._device, self._tensors()) as peak:
                yield self._count
            self._peak = max(self._peak, peak.bytes)
        else:
            yield self._count
        self._steps += 1
        self._seconds += time.perf_counter() - begin

    def _count(self, tokens: int) -> None:
        self._tokens += tokens

    def figures(self, tokens: int | None = None) -> dict[str, float]:
        """The stage's figures; `tokens` where they were not counted step by step."""
        counted = self._tokens if tokens is None else tokens
        return {
            "seconds": round(self._seconds, 2),
            "tokens_per_second": round(counted / max(self._seconds, 1e-9), 1),
            "peak_memory_bytes": self._peak,
            "peak_rss_bytes": peak_rss_bytes(),
        }
