"""Launch runs in several processes, as users do, and read what they came to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.torch import load_file
from torch import Tensor

ENGINES = Path("recipes/engines")
ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds for a launch: a hang is a failure."""


def engine_environment(engine: str) -> dict[str, str]:
    """What `accelerate launch` sets for one of our configs: it only writes the config into the environment."""
    config = yaml.safe_load((ROOT / ENGINES / f"{engine}.yaml").read_text())
    if config["distributed_type"] == "DEEPSPEED":
        names = {name: str(value) for name, value in config["deepspeed_config"].items()}
        return {"ACCELERATE_USE_DEEPSPEED": "true"} | {
            f"ACCELERATE_DEEPSPEED_{name.upper()}": value for name, value in names.items()
        }
    if config["distributed_type"] == "FSDP":
        return {"ACCELERATE_USE_FSDP": "true"} | {
            name.upper(): str(value) for name, value in config["fsdp_config"].items()
        }
    return {}


def environment(**more: str) -> dict[str, str]:
    """This process's, with one thread for each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


def torchrun(count: int, *arguments: object, engine: str = "ddp", **options: Any) -> subprocess.Popen[str]:
    """Start so many processes with torchrun."""
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


def finished(process: subprocess.Popen[str], limit: float = LIMIT) -> tuple[int, str]:
    """Wait for it, so many seconds at most; its exit status and what it said."""
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        said, _ = process.communicate()
        raise AssertionError(f"still running after {limit} s:\n{said[-4000:]}") from None
    return process.returncode, said


def learned(out: Path) -> dict[str, Tensor]:
    """All tensors that a run has learned, by role and name."""
    return {
        f"{file.parents[1].name} {name}": tensor
        for file in (*out.glob("*/adapter/*.safetensors"), *out.glob("*/model/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def steps(out: Path, role: str) -> list[dict[str, float]]:
    """What a stage logged of each step."""
    return [json.loads(line) for line in (out / role / "metrics.jsonl").read_text().splitlines()]
