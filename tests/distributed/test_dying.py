"""Processes that end early: the others stop and say why, and the run goes on under any engine, with any number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from perl.recipe import load_recipe
from perl.stages import pipeline
from perl.system.progress import silence
from tests.distributed.launching import ENGINES, LIMIT, finished, learned, start, steps, torchrun

STEPS = 14


@pytest.fixture
def long_recipe(recipes: dict[str, Path], tmp_path: Path) -> Path:
    """PPO with both roles learning, for so many steps."""
    content = yaml.safe_load(recipes["adapter"].read_text())
    content["checkpoint_every"] = 2
    content["rl"] |= {"steps": STEPS, "reward": {"function": f"{recipes['adapter'].parent}/rewards.py:length"}}
    content["data"]["path"] = str(recipes["adapter"].parent / "rows.jsonl")
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def accelerate(engine: str, *arguments: object) -> subprocess.Popen[str]:
    """Start what a config of recipes/engines says."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ENGINES / f"{engine}.yaml"]
    return start([*command, *arguments], {})


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"no process of rank {rank}")


def wait_for_steps(out: Path, count: int) -> None:
    """Wait until so many steps are done."""
    for _ in range(10 * LIMIT):
        if (out / "policy" / "metrics.jsonl").exists() and len(steps(out, "policy")) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the run does not begin")


def test_a_run_is_interrupted_then_a_process_dies_then_another_engine_finishes_it(
    long_recipe: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "out"
    command = ["-m", "perl", "run", long_recipe, "--out", out]

    launcher = accelerate("fsdp2", *command)
    wait_for_steps(out, 2)
    worker(launcher, 1).send_signal(signal.SIGTERM)  # to one: all leave together
    status, said = finished(launcher)
    assert status != 0
    assert "interrupted: finished stages are saved" in said
    done = len(steps(out, "policy"))
    newest = max(folder.name for folder in (out / "policy" / "checkpoints").iterdir())
    assert newest == f"step-{done:08}"

    launcher = torchrun(4, *command)
    wait_for_steps(out, done + 2)
    victim = worker(launcher, 1)
    begin = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    status, said = finished(launcher)
    assert status != 0
    assert time.monotonic() - begin < 60
    assert said.count(f"process 1 (host {os.uname().nodename}, pid {victim.pid}) is gone") == 1
    assert "goes on from the newest checkpoint" in said
    assert done < len(steps(out, "policy")) < STEPS

    status, said = finished(accelerate("zero3", *command))
    assert status == 0, said
    assert said.count("Written:") == 1
    assert [int(step["step"]) for step in steps(out, "policy")] == list(range(1, STEPS + 1))
    hardware = json.loads((out / "report.json").read_text())["hardware"]
    assert (hardware["processes"], hardware["engine"]) == (2, "zero3")
    with silence():
        pipeline.run(load_recipe(long_recipe), tmp_path / "peaceful")
    one, several = learned(tmp_path / "peaceful"), learned(out)
    for name in one:
        torch.testing.assert_close(several[name], one[name], rtol=0, atol=1e-5)
