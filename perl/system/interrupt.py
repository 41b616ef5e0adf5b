"""Requests to stop between steps: after the first signal the step ends and is saved, the second stops at once."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from perl.parallel.processes import ALONE, Processes
from perl.system.progress import console
from perl.system.signals import LEAVE, handled

GRACE = 3.0
"""Seconds during which a launcher may forward a signal that the terminal has sent to all processes."""


@dataclass
class StopRequest:
    """A request to stop after the current step."""

    processes: Processes = ALONE
    noted: bool = False
    """Whether this process was asked, which it may be at any time, even inside `poll`."""
    requested: bool = False
    """Whether the last poll found that any process was asked: all processes agree on it."""

    def poll(self) -> bool:
        """Return whether any process was asked to stop; to be called by all processes, once per step."""
        self.requested = self.processes.any_true(self.noted)
        return self.requested


@contextlib.contextmanager
def between_steps(processes: Processes = ALONE) -> Iterator[StopRequest]:
    """Only note signals to stop inside, for the training loop to poll after each step.

    In other threads nothing changes, as only the main thread can handle signals.
    """
    stop, first = StopRequest(processes), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.noted and (processes.count == 1 or time.monotonic() > first + GRACE):
            raise KeyboardInterrupt
        if stop.noted:
            return
        stop.noted, first = True, time.monotonic()
        console.print("Stopping after this step; interrupt again to stop at once.")

    with handled(LEAVE, note):
        yield stop
