"""One computation at a time behind a bounded queue: the base in memory can only act as one role at a time."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
PLACES = 64
RETRY_AFTER = 5
"""Seconds after which a refused request may be sent again."""


class BusyError(Exception):
    """The queue is full; the client should retry later."""


class Worker:
    """Executes work in one thread, in order.

    Args:
        places: number of computations that may wait or run at the same time.
    """

    def __init__(self, places: int = PLACES) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._places = threading.BoundedSemaphore(places)

    async def run(self, work: Callable[[], T]) -> T:
        """Return the result of `work`. Raises `BusyError`, or what `work` raises."""
        return await asyncio.wrap_future(self.submit(work))

    def stream(self, work: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Yield what `work` yields, while it runs; it stops after its next piece when nobody listens any more.

        Raises:
            BusyError: immediately, before the iterator is used.
        """
        loop, pieces, left = asyncio.get_running_loop(), asyncio.Queue[T | None](), threading.Event()

        def put(piece: T | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is stopping
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def all_pieces() -> None:
            for piece in work():
                put(piece)
                if left.is_set():
                    return

        future = self.submit(all_pieces)
        future.add_done_callback(lambda _: put(None))

        async def listen() -> AsyncGenerator[T, None]:
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece
                future.result()
            finally:
                left.set()
                future.cancel()

        return listen()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue `work`. Raises `BusyError`."""
        if not self._places.acquire(blocking=False):
            raise BusyError
        future = self._thread.submit(work)
        future.add_done_callback(lambda _: self._places.release())
        return future

    @contextlib.asynccontextmanager
    async def lifespan(self, _: object) -> AsyncGenerator[None, None]:
        """Close the worker when the ASGI application ends."""
        yield
        self.close()

    def close(self) -> None:
        """Cancel waiting work, and wait for the work in progress."""
        self._thread.shutdown(cancel_futures=True)
