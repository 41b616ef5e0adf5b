"""Programs that are started and waited for."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from perl.system.child import run_child

SAVES = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
pathlib.Path("ready").touch()
while not asked:
    time.sleep(0.01)
time.sleep(1)  # a step that takes a while to end
pathlib.Path("saved").write_text(str(len(asked)))
sys.exit(130)
"""

STOPS = """
import pathlib, signal, time
from perl.system.child import stop_with_parent
def save(*_):
    pathlib.Path("saved").touch()
    raise SystemExit
signal.signal(signal.SIGTERM, save)
stop_with_parent()
pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_the_exit_status_or_the_signal_is_returned() -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -signal.SIGKILL


def test_an_interrupted_program_is_told_once_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while not Path("ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert run_child([sys.executable, "-c", SAVES]) == 130
    assert Path("saved").read_text() == "1"
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_program_is_told_to_stop_when_its_parent_is_killed(tmp_path: Path) -> None:
    starts = f"import sys; from perl.system.child import run_child; run_child([sys.executable, '-c', {STOPS!r}])"
    parent = subprocess.Popen([sys.executable, "-c", starts], cwd=tmp_path)
    wait_for(tmp_path / "ready")
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "saved")


def wait_for(file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, f"{file.name} was not written"
        time.sleep(0.01)
