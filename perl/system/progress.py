"""The console, and progress bars with the time left."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]
"""Called once a step, with the metrics to show beside the bar."""

LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal for a bar."""
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


@contextlib.contextmanager
def track(what: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar over `total` steps, of which `done` are done; call what it yields once a step."""
    counts = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    with Progress("{task.description:<12}", *counts, "{task.fields[metrics]}", console=console) as progress:
        task = progress.add_task(what, total=total, completed=done, metrics="")
        last, count = time.monotonic(), done

        def advance(**metrics: float) -> None:
            nonlocal last, count
            shown, count = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items()), count + 1
            progress.update(task, advance=1, metrics=shown)
            if not console.is_terminal and time.monotonic() - last >= LINE_EVERY:
                last = time.monotonic()
                console.print(f"{what} {count} of {total}  {shown}")

        yield advance
