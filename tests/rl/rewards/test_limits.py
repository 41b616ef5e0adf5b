"""Functions with a time limit, and in a separate process."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from perl.data.records import Prompt, Turn
from perl.errors import UserError
from perl.rl.rewards.function import RewardFunction

FUNCTIONS = """
import os, time, torch
def judge(prompts, completions, **columns):
    if completions[0] == "sleep":
        time.sleep(60)
    if completions[0] == "die":
        os._exit(3)
    if completions[0] == "fail":
        raise KeyError("colour")
    if completions[0] == "set":
        return {1.0}
    if completions[0] == "learned":
        return torch.ones(1, requires_grad=True)
    return (float(os.getpid()) for _ in completions)
"""
PROMPT = Prompt((Turn("text", "one"),), "one")
SAMPLES = cast(Any, SimpleNamespace(completions=lambda: [[1]]))


@pytest.fixture
def location(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    return f"{tmp_path}/own.py:judge"


def test_a_slow_function_ends_the_run_and_a_quick_one_is_left_in_peace(location: str) -> None:
    reward = RewardFunction(location, [PROMPT], time_limit=0.1)
    with pytest.raises(UserError, match=r"TimeoutError: it took longer than time_limit, 0\.1 seconds"):
        reward([PROMPT], SAMPLES, ["sleep"])
    assert reward([PROMPT], SAMPLES, ["go"]) == [os.getpid()]


CATCHING = """
import time
def judge(completions, **columns):
    try:
        time.sleep(60.0)
    except {caught}:
        return [0.0]
"""


@pytest.mark.parametrize(("caught", "line"), [("Exception", ":5"), ("BaseException", "")])
def test_a_function_that_scores_0_after_a_failure_does_not_do_so_after_the_limit(
    caught: str, line: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(CATCHING.format(caught=caught))
    reward = RewardFunction(f"{tmp_path}/own.py:judge", [PROMPT], time_limit=0.1)
    with pytest.raises(UserError, match=rf"own\.py{line}: the reward function failed: TimeoutError"):
        reward([PROMPT], SAMPLES, ["go"])


def test_a_process_of_its_own_lasts_until_it_fails(location: str) -> None:
    reward = RewardFunction(location, [PROMPT], time_limit=1.0, own_process=True)
    first = reward([PROMPT], SAMPLES, ["go"])
    assert first != [os.getpid()]
    with pytest.raises(UserError, match=r"own\.py:9: the reward function failed: KeyError: 'colour'"):
        reward([PROMPT], SAMPLES, ["fail"])
    with pytest.raises(UserError, match="it returned set"):
        reward([PROMPT], SAMPLES, ["set"])
    assert reward([PROMPT], SAMPLES, ["learned"]) == [1.0]
    assert reward([PROMPT], SAMPLES, ["go"]) == first
    with pytest.raises(UserError, match="its process ended with exit code 3"):
        reward([PROMPT], SAMPLES, ["die"])
    second = reward([PROMPT], SAMPLES, ["go"])
    assert second != first
    with pytest.raises(UserError, match="longer than time_limit"):
        reward([PROMPT], SAMPLES, ["sleep"])


def test_signals_to_the_run_do_not_end_a_process_of_its_own(location: str) -> None:
    reward = RewardFunction(location, [PROMPT], time_limit=60.0, own_process=True)
    first = reward([PROMPT], SAMPLES, ["go"])
    assert os.getpgid(int(first[0])) != os.getpgid(0), "signals to the run's process group do not reach it"
    assert reward([PROMPT], SAMPLES, ["go"]) == first


def test_a_process_that_ends_while_it_imports_the_function_is_named(location: str) -> None:
    with Path(location.rpartition(":")[0]).open("a") as file:
        file.write("import multiprocessing\nif multiprocessing.parent_process():\n    os._exit(4)\n")
    reward = RewardFunction(location, [PROMPT], own_process=True)
    with pytest.raises(UserError, match="its process ended with exit code 4"):
        reward([PROMPT], SAMPLES, ["go"])


SCRIPT = """
print("started")
from types import SimpleNamespace
from perl.data.records import Prompt, Turn
from perl.rl.rewards.function import RewardFunction
prompt = Prompt((Turn("text", "one"),), "one")
reward = RewardFunction("own.py:judge", [prompt], own_process=True)
print(reward([prompt], SimpleNamespace(completions=lambda: [[1]]), ["go"]))
"""


def test_a_script_is_not_run_again_in_the_process(location: str, tmp_path: Path) -> None:
    """A script for the library needs no `if __name__ == "__main__"`."""
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("started") == 1


WAITING = """
import asyncio
async def judge(completions, **columns):
    await asyncio.sleep(60.0 if completions[0] == "sleep" else 0.0)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("own_process", [False, True])
def test_a_function_may_be_async(own_process: bool, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(WAITING)
    reward = RewardFunction(f"{tmp_path}/own.py:judge", [PROMPT], time_limit=1.0, own_process=own_process)
    assert reward([PROMPT], SAMPLES, ["four"]) == [4.0]
    with pytest.raises(UserError, match="longer than time_limit"):
        reward([PROMPT], SAMPLES, ["sleep"])
