"""Who is alive: each process beats in the launcher's store, watches the others, and names the one that stops.

A process that dies leaves the others waiting in a collective: with gloo they are told in the words of a socket,
with NCCL after many minutes. A thread looks every few seconds. A process of this host is gone when the kernel says
so; one of another host when its beat has not changed for half a minute.
"""

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

BEAT = 2.0
"""Seconds from one beat to the next."""
SILENCE = 30.0
"""Seconds without a beat after which a process of another host is gone."""
LEAVE = 10.0
"""Seconds that this process has to leave by itself once another is gone; then it is ended."""


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    rank: int
    host: str
    pid: int
    space: str
    """Of process numbers: containers on one host have their own."""

    def __str__(self) -> str:
        return f"process {self.rank} (host {self.host}, pid {self.pid})"


def here(rank: int) -> Place:
    """This process."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return Place(rank, socket.gethostname(), os.getpid(), space)


class Heartbeat:
    """Beats, and watches the beats of the others.

    Args:
        store: the launcher's; this makes a connection of its own to it, so that who waits there holds up nobody.
        rank, count: this process's, and how many there are.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store.clone(), rank, count
        self._mine = here(rank)
        self._places: dict[int, Place] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.gone: str | None = None
        """Who has died without a word, once one has."""
        self._store.set(f"perl/place/{rank}", json.dumps(asdict(self._mine)))
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self, status: int) -> None:
        """Say that this process leaves on its own account, so that nobody takes it for dead."""
        self._ended.set()
        self._thread.join(BEAT + 1)
        with self._lock:
            self._try(lambda: self._store.set(f"perl/left/{self._rank}", str(status)))

    def left(self) -> int | None:
        """The exit status of a process that left with something wrong, once one has."""
        with self._lock:
            for rank in range(self._count):
                if status := self._try(lambda rank=rank: self._status(rank)):
                    return int(status)
        return None

    def _status(self, rank: int) -> int | None:
        key = f"perl/left/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else None

    def first_to_tell(self) -> bool:
        """Whether nobody has told of a failure before."""
        with self._lock:
            told = self._try(lambda: self._store.add("perl/told", 1))
        return told in (None, 1)

    def cause(self, seconds: float) -> str | int | None:
        """Wait until it is known why a collective failed: who is gone, or the status that another left with."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.gone is not None:
                return self.gone
            if (status := self.left()) is not None:
                return status
            time.sleep(0.2)
        return None

    def _watch(self) -> None:
        beat, status = 0, None
        while not self._ended.wait(BEAT):
            beat += 1
            with self._lock:
                self.gone = self._look(beat)
            status = self.left()
            if self.gone is not None or status is not None:
                break
        if not self._ended.wait(LEAVE):  # the main thread waits where no signal of Python's reaches it
            if self.gone is not None and self.first_to_tell():
                os.write(2, f"error: {died(self.gone)}\n".encode())
            os._exit(status or 1)

    def _look(self, beat: int) -> str | None:
        """Beat, and look for a process that does not."""
        try:
            self._store.set(f"perl/beat/{self._rank}", str(beat))
            for rank in range(self._count):
                if rank != self._rank and self._is_gone(rank):
                    return str(self._places[rank])
        except RuntimeError:  # torch's DistNetworkError among them
            return "the process that keeps the launcher's store (the first one, or its launcher)"
        return None

    def _is_gone(self, rank: int) -> bool:
        place = f"perl/place/{rank}"
        if rank not in self._places:
            if not self._store.check([place]):
                return False
            self._places[rank] = Place(**json.loads(self._store.get(place)))
        if self._status(rank) is not None:
            return False
        there, mine = self._places[rank], self._mine
        if (there.host, there.space) == (mine.host, mine.space):
            return not _runs(there.pid)
        key = f"perl/beat/{rank}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        before, since = self._beats.get(rank, (None, 0.0))
        if beat != before:
            self._beats[rank] = beat, time.monotonic()
            return False
        return time.monotonic() - since > SILENCE

    @staticmethod
    def _try(ask: Any) -> Any:
        """What the store says; None where it is gone."""
        try:
            return ask()
        except RuntimeError:
            return None


def died(who: str) -> str:
    """What is said of a process that is gone."""
    return (
        f"{who} is gone: killed, out of memory, or its host is down; the others stop\n"
        "  Launch the same command again: it goes on from the newest checkpoint, with any number of processes."
    )


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
