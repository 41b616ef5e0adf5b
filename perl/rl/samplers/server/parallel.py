"""Many calls at once, in threads that nobody has to wait for."""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """The results of `work` on each item, in their order.

    The threads are daemons: a run that is interrupted, or whose call has failed, leaves at once, whatever the
    others still wait for.

    Raises:
        Exception: the first that a call raised; no further calls are begun.
    """
    numbers = itertools.count()  # `next` of it is one step to other threads
    done: queue.SimpleQueue[tuple[int, R | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set() and (number := next(numbers)) < len(items):
            try:
                done.put((number, work(items[number]), None))
            except BaseException as error:
                done.put((number, None, error))
                return

    results: dict[int, R] = {}
    for _ in range(min(workers, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result  # type: ignore[assignment]
    finally:
        stop.set()
    return [results[number] for number in range(len(items))]
