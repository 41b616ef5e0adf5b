"""Requests to stop between steps."""

import os
import signal
from dataclasses import dataclass

from perl.parallel.processes import Processes
from perl.system.interrupt import between_steps


@dataclass(frozen=True)
class Signalled(Processes):
    """Two processes, of which this one receives a signal while they agree whether to stop."""

    def any_true(self, flag: bool) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return flag


def test_a_signal_during_the_poll_stops_all_processes_at_the_next() -> None:
    """It must neither be lost nor stop this process alone: the others would wait for it."""
    with between_steps(Signalled(0, 2)) as stop:
        assert not stop.poll()
        assert not stop.requested
        assert stop.poll()
