"""`benchmarks.gpu` keeps its results whatever fails, and writes them as the docs' tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import parts
from benchmarks.gpu.__main__ import SECONDS, Measuring, measure_all
from benchmarks.gpu.table import markdown

PROJECT = Path(__file__).parents[1]
STAND_IN = """
import sys, time
print("a note")
{"good": lambda: print('{"seconds": 1}'), "bad": lambda: sys.exit("out of memory"), "slow": lambda: time.sleep(60),
 "late": lambda: print("{}")}[sys.argv[1]]()
"""
"""A program that replaces the parts."""
GB = 10**9
STEP = {
    "seconds": {"generate": 2.0, "score": 0.5, "update": 1.0},
    "tokens_per_second": {"generate": 4096.0, "score": 49152.0, "update": 24576.0},
    "flops_per_second": 2e14,
    "peak_bytes": {"load": 2 * GB, "update": 4 * GB},
}


def test_a_part_that_fails_or_hangs_loses_only_itself(tmp_path: Path) -> None:
    measuring = Measuring(tmp_path, [sys.executable, "-c", STAND_IN], seconds=100)
    measure_all(measuring, {"bad": 30, "slow": 1, "good": 30}, on_host={"late": 30})
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: one.get("failed", one.get("found")) for name, one in results.items()} == {
        "bad": "out of memory",
        "slow": "not finished after 1 s",
        "good": {"seconds": 1},
        "late": {},
    }
    assert "- slow: not finished after 1 s" in (tmp_path / "table.md").read_text()


def test_nothing_is_begun_when_time_is_up(tmp_path: Path) -> None:
    measuring = Measuring(tmp_path, ["nothing", "that", "runs"], seconds=0)
    measuring.measure("good", 30)
    assert measuring.results["good"]["failed"] == "no time was left"


def test_the_table() -> None:
    speed = {"flops_per_second": 8e14, "bytes_per_second": 4e12}
    chip = {"device": "H", "torch": "2.11", "memory_bytes": 143 * GB, **speed}
    found = {
        "machine": chip,
        "ppo-1b": STEP,
        "estimate-ppo-1b": {"peak_bytes": {"load": 2 * GB, "update": 5 * GB}},
        "generate": {"one answer a prompt": {"ours": 9000.0, "generate": 4500.0, "ratio": 2.0}},
        "trl-rloo": {"seconds": 9.25, "peak_bytes": 6 * GB},
        "tests": {"seconds": 40.0, "said": ["", "8 passed"]},
    }
    results = {name: {"found": one} for name, one in found.items()} | {"demo": {"failed": "killed"}}
    lines = markdown(results).replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert lines[0] == "H, 143 GB, torch 2.11: 800 TFLOP/s in bf16, 4 TB/s."
    assert "| ppo-1b | 2, 0.5, 1 | 4,096, 49,152, 24,576 | 25.0% | 4.0 GB | 5.0 GB |" in lines
    assert "| generate, one answer a prompt | 4,500 |" in lines
    assert "| trl-rloo | 9.25 | 6.0 GB |" in lines
    assert "tests: 40 s; 8 passed" in lines
    assert lines[-1] == "- demo: killed"


def test_every_step_has_its_estimate_and_the_chip_is_known_first() -> None:
    assert next(iter(parts.PARTS)) == "machine"
    assert {f"estimate-{name}" for name in parts.STEPS} == {n for n, part in parts.PARTS.items() if part.on_host}
    assert SECONDS < 600


def test_the_parts_that_no_model_is_needed_for() -> None:
    found = parts.machine(parts.TOY)
    assert found["flops_per_second"] > 1e6
    assert found["bytes_per_second"] > 1e6


@pytest.mark.slow
def test_all_parts_run_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == parts.PARTS.keys()
    assert {name: one["failed"] for name, one in results.items() if "failed" in one} == {}
