"""Programs that this process starts and waits for."""

import subprocess
from collections.abc import Sequence

from perl.system.signals import LEAVE, handled


def run_child(command: Sequence[str]) -> int:
    """Run a program to its end; return its exit status, or minus the signal that ended it.

    Signals to stop are passed on, and the program is waited for, so that it can save its work. It runs in a
    session of its own: the terminal would send it Ctrl-C too, and twice means to stop at once.
    """
    child = subprocess.Popen(command, start_new_session=True)
    with handled(LEAVE, lambda signum, _: child.send_signal(signum)):
        return child.wait()
