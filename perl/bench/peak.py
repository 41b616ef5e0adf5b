"""The most memory a process held, over what it held before: resident on the CPU, allocated on CUDA."""

import threading
import time
from types import TracebackType

import psutil
import torch

INTERVAL = 0.02
"""Seconds between two looks at the resident memory."""


class PeakOverStart:
    """Inside, memory is watched; afterwards `bytes` is how much more was held than on entry."""

    def __init__(self) -> None:
        self.bytes = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakOverStart":
        self._start = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)
            time.sleep(INTERVAL)
