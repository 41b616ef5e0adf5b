"""Detection of dead, failed and healthy processes, as seen by one process through the launcher's store."""

import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from perl.parallel import heartbeat
from perl.parallel.heartbeat import Heartbeat


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """Yield a store local to this process, with fast heartbeats; no process is ended."""
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "SILENCE", 0.3)
    monkeypatch.setattr(heartbeat, "LEAVE", 60.0)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def place(store: dist.TCPStore, rank: int, host: str, pid: int) -> None:
    """Publish a process's place in the store, as that process would."""
    store.set(f"perl/process/{rank}", json.dumps([host, "its own", pid]))


def test_processes_that_are_well_and_one_that_has_not_come_are_not_dead(store: dist.TCPStore) -> None:
    hearts = [Heartbeat(store, rank, 3) for rank in (0, 1)]
    assert [heart.cause(0.5) for heart in hearts] == [None, None]
    assert [heart.first_to_report() for heart in hearts] == [True, False]
    hearts[1].leave(0)
    assert hearts[0].cause(0.5) is None
    hearts[0].leave(0)


def test_one_of_this_host_is_dead_when_its_process_has_ended(store: dist.TCPStore) -> None:
    heart = Heartbeat(store, 0, 2)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = json.loads(store.get("perl/process/0"))
    store.set("perl/process/1", json.dumps([*own[:2], process.pid]))
    assert heart.cause(0.5) is None  # it has no heartbeat, but runs
    process.communicate()
    assert heart.cause(10) == f"process 1 (host {os.uname().nodename}, pid {process.pid})"
    heart.leave(1)


def test_one_of_another_host_is_dead_when_it_is_silent(store: dist.TCPStore) -> None:
    heart = Heartbeat(store, 0, 2)
    place(store, 1, "elsewhere", os.getpid())
    for beat in range(20):
        store.set("perl/beat/1", str(beat))
        assert heart.cause(0.05) is None
    assert heart.cause(10) == f"process 1 (host elsewhere, pid {os.getpid()})"
    heart.leave(1)


def test_one_that_fails_by_itself_tells_its_status(store: dist.TCPStore) -> None:
    hearts = [Heartbeat(store, rank, 2) for rank in (0, 1)]
    hearts[1].leave(2)
    assert hearts[0].cause(10) == 2
    hearts[0].leave(2)


def test_a_lost_store_is_a_cause_too(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    heart = Heartbeat(store, 0, 2)

    def lost() -> None:
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(heart, "_look", lost)
    assert "the process that holds the launcher's store" in str(heart.cause(10))
    heart.leave(1)
