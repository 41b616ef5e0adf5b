"""The demo's RL with vLLM itself: `make vllm` sets it up, `pytest -m vllm -n 0` runs this, some 15 minutes."""

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunCli

ROOT = Path(__file__).parents[4]
VENV = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm"))
URL = "http://127.0.0.1:8111"
STEPS = "rl.steps=20"
KILLED_AFTER = 8
"""Steps."""

pytestmark = pytest.mark.vllm


class Vllm:
    """A server that can be killed and started again.

    Args:
        command: what `perl-rlhf sampler` prints.
    """

    def __init__(self, command: str, folder: Path) -> None:
        self._command = command.replace("python -m", f"{shlex.quote(str(VENV))}/bin/python -m")
        self._log = folder / "vllm.log"

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.kill()

    def start(self) -> None:
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                self._command,
                shell=True,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1"},
            )

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def lines(out: Path) -> list[dict[str, Any]]:
    file = out / "policy" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def when(reached: Callable[[], bool], act: Callable[[], None]) -> None:
    """Act once something is reached, beside the test."""

    def wait() -> None:
        while not reached():
            time.sleep(0.2)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_the_demos_rl_learns_as_much_with_vllm_which_is_killed_and_started_anew(
    run_cli: RunCli, tmp_path: Path
) -> None:
    if not (VENV / "bin" / "python").exists():
        pytest.skip("make vllm sets it up")
    demo, local, served = ROOT / "recipes" / "quickstart.yaml", tmp_path / "local", tmp_path / "served"
    status, said = run_cli("run", demo, STEPS, "--out", local)
    assert status == 0, said
    server = [f"rl.sampler.url={URL}", f"rl.sampler.adapter_dir={tmp_path / 'adapters'}"]
    status, said = run_cli("sampler", demo, "--cpu", *server)
    assert status == 0, said
    vllm = Vllm(said[said.index("VLLM_") :], tmp_path)

    def restart() -> None:
        vllm.kill()
        vllm.start()

    when(lambda: len(lines(served)) >= KILLED_AFTER, restart)
    with vllm.running():
        status, said = run_cli("run", demo, STEPS, *server, "--from", local, "--out", served)
    assert status == 0, said
    assert "it is waited for" in said
    steps = lines(served)
    assert len({step["adapter"] for step in steps}) == len(steps)
    assert max(step["sampler_mismatch"] for step in steps) < 1e-4
    ours, theirs = (
        json.loads((out / "report.json").read_text())["stages"]["rl"]["eval"] for out in (local, served)
    )
    assert theirs["gold_before"] == pytest.approx(ours["gold_before"], abs=0.09)  # two standard errors, n = 256
    assert theirs["gold_after"] == pytest.approx(ours["gold_after"], abs=0.09)
    assert theirs["gold_interval"][0] > 0
