"""Programs that this process starts and waits for."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from perl.system.signals import LEAVE, handled

_PARENT = "PERL_RLHF_PARENT"
_PR_SET_PDEATHSIG = 1


def run_child(command: Sequence[str]) -> int:
    """Run a program to its end; return its exit status, or minus the signal that ended it.

    Signals to stop are passed on, and the program is waited for, so that it can save its work. It runs in a
    session of its own: the terminal would send it Ctrl-C too, and twice means to stop at once.
    """
    child = subprocess.Popen(command, env={**os.environ, _PARENT: str(os.getpid())}, start_new_session=True)
    with handled(LEAVE, lambda signum, _: child.send_signal(signum)):
        return child.wait()


def stop_with_parent() -> None:
    """Have Linux send SIGTERM when the process that started this one with `run_child` ends, even by SIGKILL."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has ended before
        os.kill(os.getpid(), signal.SIGTERM)
