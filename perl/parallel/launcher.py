"""A launcher's environment variables, and the exit of a launched process; does not import torch."""

import atexit
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_status: int | None = None
"""Exit status of a program whose main function has ended."""


def ranks() -> tuple[int, int, int]:
    """Return the rank, the number of processes and the local rank; 0, 1, 0 without a launcher."""
    rank, count, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return rank, count, local


def skips_finalization(main: Callable[[], None]) -> Callable[[], NoReturn]:
    """Make a program exit with the status of its main function, whatever threads libraries have left running.

    Before Python 3.13, a C++ thread that wakes up during the interpreter's finalization aborts the process
    ("terminate called without an active exception"), and the launcher reports a finished run as failed. So a
    launched process skips finalization: it exits after its Python threads have ended and `atexit` functions have
    run. Exceptions other than SystemExit are raised as usual.
    """

    @functools.wraps(main)
    def program() -> NoReturn:
        global _status
        try:
            main()
            sys.exit(0)
        except SystemExit as leaving:
            _status = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
            raise

    return program


@atexit.register  # runs after all functions that libraries register, since these are imported later
def _skip_finalization() -> None:
    if _status is not None and ranks()[1] > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
