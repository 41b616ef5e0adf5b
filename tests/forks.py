"""Processes for runs, forked from one that has imported all libraries, because the import takes longer than a run.

The parent of the forks is itself a fork of the test process, made before any test, because torch refuses to
compute gradients in a fork of a process that has computed some.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from unittest import mock

from perl.report import svg
from perl.stages import pipeline  # noqa: F401  imported once, for all forks
from tests.blank import Blank

_server: Connection | None = None


@dataclass(frozen=True)
class _Start:
    """A call of a main function; `terminal` is the path of a terminal for standard input, output and error."""

    main: Callable[[], object]
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    terminal: bool


@dataclass
class Fork:
    """A started process in its own session."""

    pid: int
    log: Path
    status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or minus the signal that ended the process; None while it runs."""
        if self.status is None:
            self.status = _ask(self.pid)
        return self.status

    def wait(self, seconds: float) -> int:
        """Return the exit status; fail if the process runs longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running: {self.said()}"
            time.sleep(0.005)
        return status

    def said(self) -> str:
        """Return its standard output and error so far."""
        return self.log.read_text(encoding="utf-8")

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def begin() -> None:
    """Fork the process that is the parent of all forks."""
    global _server
    _server, its = Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads, none of which the fork uses
        child = os.fork()
    if child:
        its.close()
        return
    _server.close()
    svg.Figure = Blank  # type: ignore[assignment,misc]  # forks draw no plots
    running: set[int] = set()
    with contextlib.suppress(EOFError):
        while True:
            question = its.recv()
            answer = _answer(question)
            its.send(answer)
            if isinstance(question, _Start):
                running.add(answer or 0)
            elif answer is not None:
                running.remove(question)
    for pid in running:  # left by a failed test
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def begin_forkserver() -> None:
    """Fork the server of multiprocessing's method "forkserver", which would otherwise import everything again."""

    def fork(_path: bytes, arguments: Sequence[str], passed: Sequence[int]) -> int:
        if pid := os.fork():
            return pid
        try:
            for number in range(3, 256):  # it ends when no other process holds the other end of the last pipe
                with contextlib.suppress(OSError):
                    if number not in passed and os.path.sameopenfile(number, passed[1]):
                        os.close(number)
            exec(arguments[-1])
        finally:
            os._exit(0)

    resource_tracker.ensure_running()
    with warnings.catch_warnings(), mock.patch("multiprocessing.util.spawnv_passfds", fork):
        warnings.simplefilter("ignore", DeprecationWarning)
        forkserver.ensure_running()


def start(
    main: Callable[[], object],
    *arguments: object,
    log: Path,
    terminal: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Fork:
    """Call a main function as a program: `sys.argv` has these arguments, and SIGHUP has its default effect.

    Args:
        log: file for its output; with `terminal`, its controlling terminal.
        environment: added to this process's.
    """
    words = tuple(map(str, arguments))
    pid = _ask(_Start(main, words, {**os.environ, **(environment or {})}, log, terminal))
    assert pid is not None
    return Fork(pid, log)


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, check: bool = False, **_: object
) -> subprocess.CompletedProcess[str]:
    """Replace `subprocess.run` of this Python with one of our modules; stdout includes stderr."""
    python, flag, module, *arguments = command
    assert (python, flag, check) == (sys.executable, "-m", False)
    main = import_module("perl.cli" if module == "perl" else module).main
    with tempfile.TemporaryDirectory() as scratch:
        process = start(main, *arguments, log=Path(scratch) / "log", environment=env)
        status = process.wait(600)
        return subprocess.CompletedProcess(command, status, process.said(), "")


def _ask(question: "_Start | int") -> int | None:
    assert _server is not None
    _server.send(question)
    answer: int | None = _server.recv()
    return answer


def _answer(question: "_Start | int") -> int | None:
    if isinstance(question, int):
        pid, status = os.waitpid(question, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    if pid := os.fork():
        return pid
    status = 1
    try:
        _become(question)
        question.main()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)


def _become(program: _Start) -> None:
    """Set session, environment, output and signals as in a new process."""
    os.setsid()  # so that the terminal opened next becomes the controlling one
    flags = os.O_RDWR if program.terminal else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    opened = os.open(program.log, flags, 0o600)
    for number in (0, 1, 2) if program.terminal else (1, 2):
        os.dup2(opened, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, buffering=1) for number, mode in enumerate("rww"))
    for each in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(program.environment)
    sys.argv = ["perl-rlhf", *program.arguments]
