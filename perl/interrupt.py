"""Leaving between steps: the first Ctrl-C or SIGTERM lets a step end and be saved, the second leaves at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from perl.progress import console


@dataclass
class Leaving:
    """Whether someone asked to leave."""

    wanted: bool = False


@contextlib.contextmanager
def between_steps() -> Iterator[Leaving]:
    """Inside, a signal to leave is only noted; whoever trains asks after each step, saves, and leaves.

    Off the main thread nothing changes: Python lets no other thread handle signals.
    """
    leaving = Leaving()
    if threading.current_thread() is not threading.main_thread():
        yield leaving
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if leaving.wanted:
            raise KeyboardInterrupt
        leaving.wanted = True
        console.print("Leaving once this step is done and saved; once more to leave at once.")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield leaving
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
