"""Concurrent calls in daemon threads."""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Calls(Generic[T, R]):
    """Calls of `work` on each item, started at once.

    The threads are daemons, so that a run that is interrupted or has a failed call exits at once, even while
    others still wait.
    """

    def __init__(self, work: Callable[[T], R], items: Sequence[T], workers: int) -> None:
        self._work, self._items = work, items
        self._numbers = itertools.count()  # its `next` is atomic
        self._done: queue.SimpleQueue[tuple[int, R] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        for _ in range(min(workers, len(items))):
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._stop.is_set() and (number := next(self._numbers)) < len(self._items):
            try:
                self._done.put((number, self._work(self._items[number])))
            except BaseException as error:
                self._done.put(error)
                return

    def results(self) -> list[R]:
        """Return the results in the order of the items; may be called only once.

        Raises:
            BaseException: the first that a call raised; no further calls are started.
        """
        found: dict[int, R] = {}
        try:
            while len(found) < len(self._items):
                one = self._done.get()
                if isinstance(one, BaseException):
                    raise one
                found[one[0]] = one[1]
        finally:
            self._stop.set()
        return [found[number] for number in range(len(found))]
