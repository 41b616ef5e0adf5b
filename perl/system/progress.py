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


_doing: list[str] = []
"""What is being done, innermost last."""


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Print every half minute what is being done inside, if there is no terminal; calls may be nested."""
    outermost, ended, began = not _doing, threading.Event(), time.monotonic()
    _doing.append(what)

    def watch() -> None:
        while not ended.wait(LINE_EVERY):
            minutes, seconds = divmod(int(time.monotonic() - began), 60)
            for now in _doing[-1:]:
                console.print(f"{now} … {minutes} min {seconds:02} s", markup=False)

    if outermost and not console.is_terminal:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _doing.pop()


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
            _doing[-1] = f"{what} {count} of {total}  {shown}".rstrip()

        yield advance
