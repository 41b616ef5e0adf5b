"""The signals that ask a process to stop: Ctrl-C, SIGTERM, and SIGHUP when its terminal closes."""

import contextlib
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> dict[signal.Signals, Any]:
    """Set a handler for these signals; return the previous ones. An ignored SIGHUP stays ignored, for nohup."""

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _mute_lost_terminal()
        handler(signum, frame)

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return {n: signal.signal(n, on_signal) for n in numbers if not (ignored and n is signal.SIGHUP)}


@contextlib.contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals inside the block, as with `handle`."""
    before = handle(numbers, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _mute_lost_terminal() -> None:
    """Discard output to a closed terminal: writing to it would fail and end the run before it is saved."""
    for output in (1, 2):
        try:
            lost = stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output)
        except OSError:  # closed
            continue
        if lost:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, output)
            os.close(null)
