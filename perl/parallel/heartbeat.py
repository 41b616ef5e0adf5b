"""Heartbeats: each process beats in the launcher's store and watches the others, to report which one died.

A process that dies leaves the others waiting in a collective. gloo then fails with a socket's message, NCCL after
its timeout, and torchrun only reports dead processes of its own host. So a thread of each process checks every few
seconds. A process on the same host is dead if the kernel says so, one on another host if its beat has not changed
for half a minute.
"""

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any, NamedTuple

import psutil

BEAT = 2.0
"""Seconds between beats."""
SILENCE = 30.0
"""Seconds without a beat after which a process on another host is considered dead."""
LEAVE = 10.0
"""Seconds that this process has to exit after another has died, before the thread ends it."""


class _Process(NamedTuple):
    """The location of a process."""

    host: str
    pid_namespace: str
    """Containers on one host have separate process ids."""
    pid: int


class Heartbeat:
    """A thread that sends this process's beats and watches those of the others.

    Args:
        store: the launcher's store; the thread gets its own connection, so that waiting callers do not block it.
        rank, count: this process's rank, and the number of processes.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store.clone(), rank, count
        namespace = "/proc/self/ns/pid"
        own_namespace = os.readlink(namespace) if os.path.exists(namespace) else ""
        self._own = _Process(socket.gethostname(), own_namespace, os.getpid())
        self._beats: dict[int, tuple[bytes | None, float]] = {}
        """The last beat of every other process, and when it was first seen."""
        self._cause: str | int | None = None
        self._failed, self._ended = threading.Event(), threading.Event()
        self._store.set(f"perl/process/{rank}", json.dumps(self._own))
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self, status: int) -> None:
        """Announce to the others that this process exits with this status."""
        self._ended.set()
        self._thread.join(BEAT + 1)
        with contextlib.suppress(RuntimeError):  # the store's process has ended
            self._store.set(f"perl/status/{self._rank}", str(status))

    def first_to_report(self) -> bool:
        """Return whether no other process has reported a failure yet."""
        try:
            return bool(self._store.add("perl/reported", 1) == 1)
        except RuntimeError:
            return True

    def cause(self, seconds: float) -> str | int | None:
        """Wait for the cause of a failed collective.

        Returns:
            the name of a dead process, or the exit status of one that failed; None if there is neither.
        """
        self._failed.wait(seconds)
        return self._cause

    def _watch(self) -> None:
        beat = 0
        while self._cause is None:
            if self._ended.wait(BEAT):
                return
            beat += 1
            try:
                self._store.set(f"perl/beat/{self._rank}", str(beat))
                self._cause = self._look()
            except RuntimeError:  # includes torch's DistNetworkError
                self._cause = "the process that holds the launcher's store (the first one, or its launcher)"
        self._failed.set()
        if not self._ended.wait(LEAVE):  # the main thread waits in a collective, which Python cannot interrupt
            if isinstance(self._cause, str) and self.first_to_report():
                os.write(2, "error: {}\n  {}\n".format(*death(self._cause)).encode())
            os._exit(self._cause if isinstance(self._cause, int) else 1)

    def _look(self) -> str | int | None:
        """Return the name of a dead process, or the exit status of a failed one."""
        for rank in range(self._count):
            status = self._read("status", rank)
            if status is not None and int(status):
                return int(status)
            if rank != self._rank and status is None and (process := self._dead(rank)):
                return f"process {rank} (host {process.host}, pid {process.pid})"
        return None

    def _dead(self, rank: int) -> _Process | None:
        """Return the process of a rank if it is dead."""
        described = self._read("process", rank)
        if described is None:  # it has not started yet
            return None
        process = _Process(*json.loads(described))
        if process[:2] == self._own[:2]:
            return None if psutil.pid_exists(process.pid) else process
        beat, now = self._read("beat", rank), time.monotonic()
        last, since = self._beats.get(rank, (None, now))
        if beat != last or rank not in self._beats:
            self._beats[rank] = beat, now
            return None
        return process if now - since > SILENCE else None

    def _read(self, what: str, rank: int) -> bytes | None:
        key = f"perl/{what}/{rank}"
        value: bytes | None = self._store.get(key) if self._store.check([key]) else None
        return value


def death(who: str) -> tuple[str, str]:
    """Return the message about a dead process, and the remedy."""
    return (
        f"{who} is gone: killed, out of memory, or its host is down; the others stop",
        "Launch the same command again: it continues from the newest checkpoint, with any number of processes.",
    )
