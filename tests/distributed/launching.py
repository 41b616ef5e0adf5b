"""Launch runs in several processes and read their results.

`torchrun` does it as users do: each process imports the libraries, which takes longer than a tiny run. `fork` uses
processes that have imported them, and does torchrun's work.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests import forks

ENGINES = Path("recipes/engines")
ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Time limit of a launch in seconds, so that a hang is a failure."""


def engine_environment(engine: str) -> dict[str, str]:
    """Return the environment variables that `accelerate launch` sets for one of our configs, all that it does."""
    config = yaml.safe_load((ROOT / ENGINES / f"{engine}.yaml").read_text())
    if config["distributed_type"] == "DEEPSPEED":
        names = {name: str(value) for name, value in config["deepspeed_config"].items()}
        return {"ACCELERATE_USE_DEEPSPEED": "true"} | {
            f"ACCELERATE_DEEPSPEED_{name.upper()}": value for name, value in names.items()
        }
    if config["distributed_type"] == "FSDP":
        return {"ACCELERATE_USE_FSDP": "true"} | {
            name.upper(): str(value).lower() for name, value in config["fsdp_config"].items()
        }
    return {}


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with one thread per process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


def torchrun(count: int, *arguments: object, engine: str = "ddp", **options: Any) -> subprocess.Popen[str]:
    """Start `count` processes with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return start([*command, *arguments], engine_environment(engine), **options)


def start(command: list[object], more: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in the project's root."""
    return subprocess.Popen(
        [str(one) for one in command],
        cwd=ROOT,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


@dataclass
class ForkedLaunch:
    """The processes of one launch, by rank, and their rendezvous store."""

    processes: list[forks.Fork]
    log: Path
    store: dist.TCPStore

    def finished(self, limit: float = LIMIT) -> tuple[int, str]:
        """Wait at most `limit` seconds; when a process fails, stop the others, as torchrun does.

        Returns:
            the exit status of the first that failed, 0 if none did; and the output of all.
        """
        deadline, failed = time.monotonic() + limit, 0
        while None in (statuses := [process.poll() for process in self.processes]):
            assert time.monotonic() < deadline, f"still running after {limit} s:\n{self.log.read_text()[-4000:]}"
            if not failed and (failed := next(filter(None, statuses), 0)):
                time.sleep(1)  # the others may notice it themselves
                for process in self.processes:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        return failed or next(filter(None, statuses), 0), self.log.read_text()


def fork(
    count: int, main: Callable[[], object], *arguments: object, log: Path, engine: str = "ddp"
) -> ForkedLaunch:
    """Start a main function in `count` processes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    common |= {"LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"TORCHELASTIC_RESTART_COUNT": "0", **engine_environment(engine)}

    def one(rank: int) -> forks.Fork:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return forks.start(main, *arguments, log=log, environment=common | own)

    return ForkedLaunch([one(rank) for rank in range(count)], log, store)


def finished(process: subprocess.Popen[str], limit: float = LIMIT) -> tuple[int, str]:
    """Wait at most `limit` seconds; return the exit status and the output."""
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        said, _ = process.communicate()
        raise AssertionError(f"still running after {limit} s:\n{said[-4000:]}") from None
    return process.returncode, said


def learned(out: Path) -> dict[str, Tensor]:
    """Return all tensors that a run has trained, by role and name."""
    return {
        f"{file.parents[1].name} {name}": tensor
        for file in (*out.glob("*/adapter/*.safetensors"), *out.glob("*/model/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def steps(out: Path, role: str) -> list[dict[str, float]]:
    """Return the metrics that a stage logged for each step."""
    return [json.loads(line) for line in (out / role / "metrics.jsonl").read_text().splitlines()]
