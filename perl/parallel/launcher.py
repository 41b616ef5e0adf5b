"""A launcher's environment variables, and how a launched process ends; without torch."""

import atexit
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_status: int | None = None
"""The exit status of a program whose main function has ended."""


def ranks() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this host: 0, 1, 0 without a launcher."""
    rank, count, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return rank, count, local


def skips_finalization(main: Callable[[], None]) -> Callable[[], NoReturn]:
    """Make a program end with the status of its main function, whatever threads libraries left running.

    Until Python 3.13, a C++ thread that wakes while the interpreter is finalized aborts the process ("terminate
    called without an active exception"), and the launcher reports a finished run as failed. So a launched process
    skips finalization: it ends when its Python threads have ended and the functions of `atexit` have run.
    Exceptions other than SystemExit are raised as usual.
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


@atexit.register  # of what libraries register, imported later than this, all runs before
def _skip_finalization() -> None:
    if _status is not None and ranks()[1] > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
