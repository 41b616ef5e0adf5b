"""Heartbeats: each process beats in the launcher's store and watches the others, to name one that died.

A process that dies leaves the others waiting in a collective. gloo ends that with the message of a socket, NCCL
after its timeout, and torchrun names only the dead of its own host. So a thread of each process looks every few
seconds. A process of the same host is dead when the kernel says so, one of another host when its beat has not
changed for half a minute.
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
"""Seconds from one beat to the next."""
SILENCE = 30.0
"""Seconds without a beat after which a process of another host is dead."""
LEAVE = 10.0
"""Seconds for this process to end once another is dead; then the thread ends it."""


class _Process(NamedTuple):
    """Where a process runs."""

    host: str
    pid_namespace: str
    """Containers on one host have their own process numbers."""
    pid: int


class Heartbeat:
    """Beats, and watches the beats of the others.

    Args:
        store: the launcher's; a connection of its own is made to it, which no waiting caller holds up.
        rank, count: this process's rank, and how many processes there are.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store.clone(), rank, count
        namespace = "/proc/self/ns/pid"
        own_namespace = os.readlink(namespace) if os.path.exists(namespace) else ""
        self._own = _Process(socket.gethostname(), own_namespace, os.getpid())
        self._beats: dict[int, tuple[bytes | None, float]] = {}
        """The last beat of each other process, and when it was first seen."""
        self._cause: str | int | None = None
        self._failed, self._ended = threading.Event(), threading.Event()
        self._store.set(f"perl/process/{rank}", json.dumps(self._own))
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self, status: int) -> None:
        """Tell the others that this process exits with this status."""
        self._ended.set()
        self._thread.join(BEAT + 1)
        with contextlib.suppress(RuntimeError):  # the store's process has ended
            self._store.set(f"perl/status/{self._rank}", str(status))

    def first_to_report(self) -> bool:
        """Whether no other process has reported a failure before."""
        try:
            return bool(self._store.add("perl/reported", 1) == 1)
        except RuntimeError:
            return True

    def cause(self, seconds: float) -> str | int | None:
        """Wait until it is known why a collective failed.

        Returns:
            the name of a dead process, or the exit status of one that failed by itself; None: neither.
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
            except RuntimeError:  # torch's DistNetworkError among them
                self._cause = "the process that holds the launcher's store (the first one, or its launcher)"
        self._failed.set()
        if not self._ended.wait(LEAVE):  # the main thread waits in a collective, where Python cannot interrupt it
            if isinstance(self._cause, str) and self.first_to_report():
                os.write(2, "error: {}\n  {}\n".format(*death(self._cause)).encode())
            os._exit(self._cause if isinstance(self._cause, int) else 1)

    def _look(self) -> str | int | None:
        """The name of a dead process, or the exit status of a failed one."""
        for rank in range(self._count):
            status = self._read("status", rank)
            if status is not None and int(status):
                return int(status)
            if rank != self._rank and status is None and (process := self._dead(rank)):
                return f"process {rank} (host {process.host}, pid {process.pid})"
        return None

    def _dead(self, rank: int) -> _Process | None:
        """The process of a rank, if it is dead."""
        described = self._read("process", rank)
        if described is None:  # it has not come yet
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
    """The message about a dead process, and the remedy."""
    return (
        f"{who} is gone: killed, out of memory, or its host is down; the others stop",
        "Launch the same command again: it resumes from the newest checkpoint, with any number of processes.",
    )
