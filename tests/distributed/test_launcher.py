"""A launched process ends with its own exit status, after all its exit handlers."""

import subprocess
import sys

import pytest

from tests.distributed.launching import environment

PROGRAM = """
import atexit, os, sys, threading, time
from perl.parallel.launcher import skips_finalization

class Last:
    def __del__(self, write=os.write):
        write(1, b"finalized")

kept = Last()
atexit.register(print, "exit")

@skips_finalization
def main():
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("main")
    ENDING

main()
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(2)", 2), ("sys.exit('message')", 1), ("raise ValueError", 1)],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_launched_process_ends_with_its_status_when_all_has_run_that_runs_at_exit(
    ending: str, status: int, count: int
) -> None:
    command = [sys.executable, "-c", PROGRAM.replace("ENDING", ending)]
    done = subprocess.run(command, env=environment(WORLD_SIZE=str(count)), capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.split() == [
        "main",
        "thread",
        "exit",
        *(["finalized"] if count == 1 or "raise" in ending else []),
    ]
    assert ("message" in done.stderr) == ("message" in ending)
