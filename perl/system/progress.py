"""The console, progress bars with the remaining time, and lines in a log that has no bar."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]
"""Called once per step, with the metrics to show next to the bar."""

LINE_EVERY = 30.0
"""Seconds between two lines if there is no terminal for a bar."""
LOOK_EVERY = 1.0
"""Seconds between two checks whether a line is due."""
console = Console(stderr=True, emoji=False, highlight=False, soft_wrap=True)
"""For all output except a command's result."""


def counted(number: int, noun: str) -> str:
    """Format a number with its noun, as in `1 step`, `2 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Show nothing on the console inside."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


class _Log:
    """The current activities, innermost last, and the time of the last line about them."""

    def __init__(self) -> None:
        self.doing: list[str] = []
        self.last = 0.0

    def due(self) -> bool:
        """Return whether a line is due; if so, it counts as written."""
        now = time.monotonic()
        if console.is_terminal or now - self.last < LINE_EVERY:
            return False
        self.last = now
        return True

    def watch(self, ended: threading.Event, began: float) -> None:
        """Print the current activity every half minute, unless something else has been printed."""
        while not ended.wait(LOOK_EVERY):
            if self.doing and self.due():
                minutes, seconds = divmod(int(time.monotonic() - began), 60)
                console.print(f"{self.doing[-1]} … {minutes} min {seconds:02} s", markup=False)


_log = _Log()


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Print at least every half minute what is being done inside, if there is no terminal; calls may be nested."""
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
    """Show a bar over `total` steps, of which `done` are done; call what it yields once per step."""
    counts = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    drawn = console.is_terminal  # otherwise there is nothing to refresh, which would need a thread
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
