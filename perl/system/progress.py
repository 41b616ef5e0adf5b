"""Progress bars with the time left, on everything that takes longer than a few seconds."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[..., None]
"""Called once a step, with the metrics to show beside the bar."""

LINE_EVERY = 30.0
"""Seconds from one line to the next where there is no terminal to draw a bar in."""
console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Where everything but a command's result goes."""


def counted(number: int, noun: str) -> str:
    """So many of what the noun names: `1 step`, `2 steps`."""
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
    """A bar over `total` steps; call what it yields once a step, with the metrics to show beside the bar."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns, console=console) as progress:
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
