"""Programs that this process starts and waits for."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from perl.system.signals import LEAVE, handled

_PARENT = "PERL_RLHF_PARENT"


def run_child(command: Sequence[str]) -> int:
    """Run a program to its end; return its exit status, or minus the signal that ended it.

    Signals to stop are passed on, and the program is waited for, so that it can save its work. It runs in a
    session of its own: the terminal would send it Ctrl-C too, and twice means to stop at once.
    """
    child = subprocess.Popen(command, env={**os.environ, _PARENT: str(os.getpid())}, start_new_session=True)
    with handled(LEAVE, lambda signum, _: child.send_signal(signum)):
        return child.wait()


def stop_with_parent() -> None:
    """Send this process SIGTERM when the process that started it with `run_child` has ended, even by SIGKILL.

    Linux's PR_SET_PDEATHSIG may send several, one for each thread of the parent, and twice means to stop at once.
    """
    parent = int(os.environ.pop(_PARENT, 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
