"""Processes that end early: the others stop and say why; any engine and number of processes can resume the run.

The environment that accelerate's launcher sets is compared for each engine; it launches the last part of the run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser

from perl import cli
from perl.recipe import load_recipe
from perl.stages import pipeline
from perl.system.progress import silence
from tests.distributed.launching import (
    ENGINES,
    LIMIT,
    ROOT,
    engine_environment,
    finished,
    fork,
    learned,
    start,
    steps,
)

STEPS = 14
HELD = """
import contextlib
import time
from pathlib import Path

HOLD, LOG = Path({hold!r}), Path({log!r})

def length(completions, **columns):
    with contextlib.suppress(FileNotFoundError):
        while len(LOG.read_text().splitlines()) >= int(HOLD.read_text()):
            time.sleep(0.02)
    return [float(len(str(text))) for text in completions]
"""
"""A reward function that waits, after as many steps as the file `hold` says, until that file is removed."""


@pytest.fixture
def long_recipe(recipes: dict[str, Path], tmp_path: Path) -> Path:
    """Write a recipe of PPO with both roles trained, for many steps."""
    content = yaml.safe_load(recipes["adapter"].read_text())
    content["checkpoint_every"] = 2
    function = HELD.format(hold=f"{tmp_path}/hold", log=f"{tmp_path}/out/policy/metrics.jsonl")
    (tmp_path / "held.py").write_text(function)
    content["rl"] |= {"steps": STEPS, "reward": {"function": f"{tmp_path}/held.py:length"}}
    content["data"]["path"] = str(recipes["adapter"].parent / "rows.jsonl")
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def accelerate(engine: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a run with a config of recipes/engines."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ENGINES / f"{engine}.yaml"]
    return start([*command, *arguments], {})


def wait_for_steps(out: Path, count: int) -> None:
    """Wait until `count` steps are done."""
    for _ in range(10 * LIMIT):
        if (out / "policy" / "metrics.jsonl").exists() and len(steps(out, "policy")) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the run does not begin")


@pytest.mark.parametrize("engine", [file.stem for file in sorted((ROOT / ENGINES).iterdir())])
def test_our_engines_are_launched_as_accelerate_does(engine: str) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    config = ["--config_file", str(ROOT / ENGINES / f"{engine}.yaml")]
    arguments = launch_command_parser().parse_args([*config, "--main_process_port", "0", "x.py"])
    with mock.patch("torch.distributed.run.run") as launch, mock.patch.dict(os.environ):
        launch.side_effect = lambda _: found.update(os.environ)
        found: dict[str, str] = {}
        launch_command(arguments)
    assert launch.call_count == 1
    assert engine_environment(engine).items() <= found.items()


def test_a_run_is_interrupted_then_a_process_dies_then_another_engine_finishes_it(
    long_recipe: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "out"
    command = ["run", long_recipe, "--out", out]
    hold = tmp_path / "hold"

    hold.write_text("2")
    launch = fork(2, cli.main, *command, log=tmp_path / "first", engine="fsdp2")
    wait_for_steps(out, 2)
    launch.processes[1].send_signal(signal.SIGTERM)  # sent to one process: all stop together
    hold.unlink()
    status, said = launch.finished()
    assert status != 0
    assert "interrupted: finished stages are saved" in said
    done = len(steps(out, "policy"))
    newest = max(folder.name for folder in (out / "policy" / "checkpoints").iterdir())
    assert newest == f"step-{done:08}"

    hold.write_text(f"{done + 2}")
    launch = fork(4, cli.main, *command, log=tmp_path / "second")
    wait_for_steps(out, done + 2)
    victim = launch.processes[1]
    begin = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    hold.unlink()
    status, said = launch.finished()
    assert status != 0
    assert time.monotonic() - begin < 60
    assert said.count(f"process 1 (host {os.uname().nodename}, pid {victim.pid}) is gone") == 1
    assert "continues from the newest checkpoint" in said
    assert done < len(steps(out, "policy")) < STEPS

    status, said = finished(accelerate("zero3", "-m", "perl", *command))
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
