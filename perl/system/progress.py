"""The console, progress bars with the time left, and a log's lines where nobody draws a bar."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]
"""Called once a step, with the metrics to show beside the bar."""

LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal for a bar."""
LOOK_EVERY = 1.0
"""Seconds between two looks at whether a line is due."""
console = Console(stderr=True, highlight=False, soft_wrap=True)
"""For all output but a command's result."""


def counted(number: int, noun: str) -> str:
    """As in `1 step`, `2 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Inside, nothing is shown."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


class _Log:
    """What is being done, innermost last, and when a line last said so."""

    def __init__(self) -> None:
        self.doing: list[str] = []
        self.last = 0.0

    def due(self) -> bool:
        """Whether a line is due; then it counts as written."""
        now = time.monotonic()
        if console.is_terminal or now - self.last < LINE_EVERY:
            return False
        self.last = now
        return True

    def watch(self, ended: threading.Event, began: float) -> None:
        """Say every half minute what is being done, where nothing else has."""
        while not ended.wait(LOOK_EVERY):
            if self.doing and self.due():
                minutes, seconds = divmod(int(time.monotonic() - began), 60)
                console.print(f"{self.doing[-1]} … {minutes} min {seconds:02} s", markup=False)


_log = _Log()


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Inside, a log says at least every half minute what is being done; calls may be nested."""
    outermost, ended = not _log.doing, threading.Event()
    _log.doing.append(what)
    watcher = threading.Thread(target=_log.watch, args=(ended, time.monotonic()), daemon=True)
    if outermost and not console.is_terminal:
        _log.last = time.monotonic()
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        _log.doing.pop()


@contextlib.contextmanager
def track(what: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar over `total` steps, of which `done` are done; call what it yields once a step."""
    counts = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    drawn = console.is_terminal  # else there is nothing to refresh, which would take a thread
    bar = Progress(
        "{task.description:<12}", *counts, "{task.fields[metrics]}", console=console, auto_refresh=drawn
    )
    with doing(f"{what} {done} of {total}"), bar as progress:
        task = progress.add_task(what, total=total, completed=done, metrics="")
        count = done

        def advance(**metrics: float) -> None:
            nonlocal count
            shown, count = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items()), count + 1
            progress.update(task, advance=1, metrics=shown)
            _log.doing[-1] = f"{what} {count} of {total}"
            if _log.due():
                console.print(f"{what} {count} of {total}  {shown}")

        yield advance
