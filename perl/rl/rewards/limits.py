"""Calling user-defined functions: what they return, a time limit, and a separate process."""

import asyncio
import contextlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Set
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from perl.system.python_file import UserCodeError, described, failed_line, import_function

STARTING_SECONDS = 120.0
"""Time limit for the process to import the function's file."""


class _Expired(BaseException):
    """The time limit is over; no `Exception`, because functions often score 0 after any of those."""


def result(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call a function; await a coroutine and read a generator, which run only then.

    The arguments may have any name, because most are the user's columns.
    """
    returned = function(**arguments)
    if inspect.isawaitable(returned):
        returned = asyncio.run(_awaited(returned))
    return list(returned) if isinstance(returned, Iterator) else returned


async def _awaited(returned: Awaitable[Any]) -> Any:
    return await returned


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `TimeoutError` after this many seconds, or when the block ends if it catches everything; None: never.

    This uses SIGALRM, which only the main thread can receive: in other threads there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    expired = False

    def expire(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise _Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    except _Expired as error:  # its traceback has the line of the user's file
        raise _too_long(seconds).with_traceback(error.__traceback__) from None
    if expired:
        raise _too_long(seconds)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the program's main module: a new process imports it, which would start a script's run once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class FunctionProcess:
    """Calls a function in a separate process, which is kept for the next call unless the function failed.

    Args:
        location: `FILE.py:NAME`.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def call(self, arguments: Mapping[str, Any], seconds: float | None) -> Any:
        """Call the function and return its result.

        Raises:
            TimeoutError: it took longer than `seconds`.
            UserCodeError: it raised an exception.
            RuntimeError: its process ended.
        """
        try:
            connection = self._started()
            connection.send(arguments)
            if not connection.poll(seconds):
                raise _too_long(seconds or 0.0)
            returned = connection.recv()
        except TimeoutError:
            self._end()
            raise
        except (EOFError, OSError):
            raise RuntimeError(f"its process ended with exit code {self._end()}") from None
        if isinstance(returned, UserCodeError):
            raise returned
        return returned

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        context = get_context("spawn")  # a fork would share torch's threads and locks
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._location), daemon=True)
        with _without_main():
            self._process.start()
        theirs.close()
        if not ours.poll(STARTING_SECONDS):
            self._end()
            raise RuntimeError("its process did not start")
        ours.recv()  # the import does not count towards the limit
        self._connection = ours
        return ours

    def _end(self) -> int | None:
        """End the process; return its exit code."""
        process, self._process, self._connection = self._process, None, None
        if process is None:
            return None
        process.join(1.0)  # a process that ended by itself has its own exit code
        process.kill()
        process.join()
        return process.exitcode


def _too_long(seconds: float) -> TimeoutError:
    return TimeoutError(f"it took longer than time_limit, {seconds:g} seconds")


def _serve(connection: Connection, location: str) -> None:
    """Answer calls, in the new process, until the other end is closed."""
    os.setsid()  # Ctrl-C and signals to the run's process group do not reach it: the run decides when to stop
    function = import_function(location)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            arguments = connection.recv()
            try:
                returned = result(function, **arguments)
                plain = isinstance(returned, str | bytes | Mapping | Set)
                connection.send(returned if plain else [_number_of(score) for score in returned])
            except (Exception, SystemExit) as error:
                file = Path(location.rpartition(":")[0]).absolute()
                connection.send(UserCodeError(described(error), failed_line(file, error)))


def _number_of(score: Any) -> Any:
    """Return the number in a tensor of one element, because tensors with gradients cannot be sent."""
    return score.item() if hasattr(score, "numel") and score.numel() == 1 else score
