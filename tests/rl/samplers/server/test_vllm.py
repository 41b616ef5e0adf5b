"""The demo's RL with vLLM itself: `make vllm` sets it up, `pytest -m vllm -n 0` runs this.

DEMO_RUN may name a finished run of recipes/quickstart.yaml, whose SFT and reward model are then reused.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
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
URL, REWARD_URL = "http://127.0.0.1:8111", "http://127.0.0.1:8112"
DEMO = ROOT / "recipes" / "quickstart.yaml"
SHORT = [
    "reward.likelihood=false",
    "rl.steps=20",
    "rl.prompts_per_step=32",
    "rl.eval_prompts=128",
    "rl.best_of_n=0",
]
KILLED_AFTER = 8
"""Number of steps."""

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
"""Environment with the user's cache, which may already have the demo's base, and one thread."""
ENVIRONMENT |= {"VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the demo with the sampler and the reward model in its own process."""
    if not (VENV / "bin" / "python").exists():
        pytest.skip("make vllm sets it up")
    folder = tmp_path_factory.mktemp("local") / "run"
    command = [sys.executable, "-m", "perl", "run", str(DEMO), *SHORT, "--out", str(folder)]
    if source := os.environ.get("DEMO_RUN"):
        command += ["--from", source]
    subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True)
    return folder


class Vllm:
    """A server that can be killed and restarted.

    Args:
        command: the output of `perl-rlhf sampler`.
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
                env=ENVIRONMENT,
            )

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def lines(out: Path) -> list[dict[str, Any]]:
    file = out / "policy" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def when(reached: Callable[[], bool], act: Callable[[], None]) -> None:
    """Call `act` in a thread once `reached` is true."""

    def wait() -> None:
        while not reached():
            time.sleep(0.2)
        act()

    threading.Thread(target=wait, daemon=True).start()


def evaluation(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())["stages"]["rl"]["eval"]
    return found


def test_the_demos_rl_learns_as_much_with_vllm_which_is_killed_and_started_anew(
    local: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    server = [f"rl.sampler.url={URL}", f"rl.sampler.adapter_dir={tmp_path / 'adapters'}"]
    status, said = run_cli("sampler", DEMO, "--cpu", *server)
    assert status == 0, said
    vllm = Vllm(said[said.index("VLLM_") :], tmp_path)

    def restart() -> None:
        vllm.kill()
        vllm.start()

    when(lambda: len(lines(served)) >= KILLED_AFTER, restart)
    with vllm.running():
        status, said = run_cli("run", DEMO, *SHORT, *server, "--from", local, "--out", served)
    assert status == 0, said
    assert "waiting for it" in said
    steps = lines(served)
    assert len({step["adapter"] for step in steps}) == len(steps) == 20
    assert max(step["sampler_mismatch"] for step in steps) < 1e-4
    ours, theirs = evaluation(local), evaluation(served)
    error = 2 * math.sqrt(2 * 0.25 / ours["n"])  # two standard errors of the difference of two shares, at most
    assert theirs["gold_before"] == pytest.approx(ours["gold_before"], abs=error)
    assert theirs["gold_after"] == pytest.approx(ours["gold_after"], abs=error)
    assert theirs["reward_interval"][0] > 0


def test_the_demos_rewards_are_those_of_its_reward_model_on_vllm(
    local: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    """The local sampler's completions are the same before the first update and in the first steps."""
    served, adapter = tmp_path / "served", tmp_path / "reward"
    assert run_cli("export", local, "reward", adapter)[0] == 0
    server = ["rl.reward.kind=server", f"rl.reward.url={REWARD_URL}", "rl.steps=2"]
    status, said = run_cli("sampler", DEMO, "--cpu", "--reward", adapter, *server)
    assert status == 0, said
    with Vllm(said[said.index("VLLM_") :], tmp_path).running():
        status, said = run_cli("run", DEMO, *SHORT, *server, "--from", local, "--out", served)
    assert status == 0, said
    assert "✓ scores of 8 held-out rows" in said
    ours, theirs = lines(local)[0], lines(served)[0]
    assert theirs["reward"] == pytest.approx(ours["reward"], abs=1e-4)
    assert evaluation(served)["reward_before"] == pytest.approx(evaluation(local)["reward_before"], abs=1e-4)
    assert len({step["server_weights"] for step in lines(served)}) == 1
