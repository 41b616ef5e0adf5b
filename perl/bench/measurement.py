"""The measurements of a step in one process: seconds by phase, and peak memory above that at the start."""

import json
import threading
import time
from dataclasses import asdict, dataclass

import psutil

INTERVAL = 0.02
"""Seconds between samples of the resident memory."""


@dataclass(frozen=True)
class Measurement:
    """The seconds of each step by phase, and the peak memory above that at the start."""

    steps: list[dict[str, float]]
    peak_over_start_bytes: int

    def print(self) -> None:
        """Print a line of JSON, which must be the last one, for `bench` to read."""
        print(json.dumps(asdict(self)))


class PeakOverStart:
    """Context that measures memory, resident (CPU) or allocated (CUDA); `bytes`: the peak above that on entry."""

    def __init__(self) -> None:
        self.bytes = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakOverStart":
        self._start = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        import torch  # the command also imports this file, and its help must not wait for torch

        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)
            time.sleep(INTERVAL)
