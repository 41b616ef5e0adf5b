"""Seconds predicted from operations: the roofline, calls, rows of typical length, and steps."""

from pathlib import Path

import pytest
import torch

from perl.errors import UserError
from perl.predict import calibrate
from perl.predict.counting import Operation
from perl.predict.device import PUBLISHED, Device, named, rate
from perl.predict.seconds import phase_seconds, stage_time
from perl.predict.subject import Rows
from perl.recipe import Recipe

CALL = {"model": 1.0, "training": 2.0, "backward": 3.0}
LARGE = Operation("product", "float32", 1000, 100, "model")
MOVED = Operation("other", "bfloat16", 0, 50, "backward")
VIEW = Operation("other", "float32", 0, 0, "training")


def device(asynchronous: bool = False) -> Device:
    flops = {"product float32": [(10.0, 10.0), (1000.0, 100.0)]}
    moved = {"product float32": [(1.0, 20.0)], "other float32": [(1.0, 10.0)]}
    return Device("test", "by hand", flops, moved, CALL, asynchronous)  # type: ignore[arg-type]


def test_rates_lie_on_logarithmic_lines() -> None:
    curve = [(10.0, 10.0), (1000.0, 100.0)]
    assert [rate(curve, size) for size in (1, 10, 1000, 5000)] == [10, 10, 100, 100]
    assert rate(curve, 100) == pytest.approx(10**1.5)


def test_a_call_takes_the_longer_of_operations_and_bytes() -> None:
    assert device().seconds(LARGE) == 10  # 1000 at 100 per second; its bytes take 5
    assert device().seconds(Operation("product", "float32", 1000, 400, "model")) == 20
    assert device().seconds(MOVED) == 5  # no rates of bf16: those of fp32
    assert device().seconds(VIEW) == 0


def test_calls_add_to_what_they_compute_unless_the_device_goes_on_alone() -> None:
    work = {LARGE: 2.0, MOVED: 4.0, VIEW: 1.0}
    assert phase_seconds(work, device()) == (2 * 1 + 4 * 3 + 1 * 2) + (2 * 10 + 4 * 5)
    assert phase_seconds(work, device(), share=0.5) == 16 + 20
    assert phase_seconds(work, device(asynchronous=True)) == 40
    assert phase_seconds(work, device(asynchronous=True), share=0.1) == 16


def recipe(**sections: object) -> Recipe:
    base = {"build": {}, "dtype": "float32"}
    content = {"name": "timed", "base": base, "data": {"source": "coffee-simulator"}, **sections}
    return Recipe.model_validate(content)


def test_supervised_steps_evaluation_and_rows_of_the_usual_length() -> None:
    timed = recipe(sft={"epochs": 2, "batch_size": 10, "max_length": 100})
    found = stage_time(timed, "sft", {"update": {LARGE: 1.0}}, Rows(95, 30, 400.0, 50.0), device())
    assert found.step == {"update": 11}
    assert found.steps == 20
    assert found.training == 20 * (1 + 10 * 50 / 100)  # the longest are cut to 100
    assert found.evaluation == pytest.approx(2 * 30 / 10 * 6 / 3)  # a forward pass of three, before and after


def test_rows_held_back_for_validation_are_not_trained_on() -> None:
    reward = {
        "epochs": 2,
        "batch_size": 10,
        "max_length": 50,
        "members": 2,
        "eval_steps": 7,
        "validation_share": 0.2,
    }
    timed = recipe(reward=reward)
    found = stage_time(timed, "reward", {"update": {LARGE: 1.0}}, Rows(100, 30, 50.0, 50.0), device())
    assert found.steps == 2 * 2 * 8  # of 80 rows
    judged = 2 * 30 + 2 * 3 * 20  # each member is validated after its steps 7, 14 and 16
    assert found.evaluation == pytest.approx(judged / 10 * 11 / 3)


def test_rl_steps_evaluation_and_the_most_that_is_drawn() -> None:
    rl = {"algorithm": "dapo", "prompts_per_step": 4, "steps": 10, "eval_prompts": 8, "eval_samples": 4}
    timed = recipe(rl={**rl, "best_of_n": 0, "max_new_tokens": 60, "reward": {"kind": "length", "target": 3}})
    assert timed.rl is not None
    work = {"generate": {LARGE: 1.0}, "score": {LARGE: 1.0}, "update": {LARGE: 2.0}}
    found = stage_time(timed, "rl", work, Rows(100, 8, 40.0, 20.0), device())  # type: ignore[arg-type]
    assert sum(found.step.values()) == 44
    short = (20 + 60) / (40 + 60)
    assert found.training == pytest.approx(10 * (11 + (1 + 10 * short) + 2 * (1 + 10 * short)))
    completions = 4 * timed.rl.samples_per_prompt
    assert found.evaluation == pytest.approx(2 * 8 * 4 / completions * (11 + 1 + 10 * short))
    assert found.draws_at_most == 1 + timed.rl.row.redraws > 1


def test_a_published_gpu_is_said_to_be_assumed() -> None:
    assert named("h100").seconds(Operation("product", "bfloat16", 10**12, 10, "model")) == pytest.approx(
        1 / (0.6 * 989.4), rel=1e-6
    )
    for name in PUBLISHED:
        assert "assumed, not measured" in named(name).basis
    with pytest.raises(UserError, match="unknown device 'b9000'"):
        named("b9000")


def test_what_was_measured_is_kept_by_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "LEAST", 1e-6)
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    monkeypatch.setattr(calibrate, "WIDTHS", (64,))
    monkeypatch.setattr(calibrate, "COUNTS", (2**12,))
    monkeypatch.setattr(calibrate, "SHAPES", ((4, 64),))
    monkeypatch.setattr(calibrate, "HEADS", (8,))
    assert calibrate.calibrated() is None
    device = calibrate.measure()
    assert calibrate.calibrated() == device
    assert all(speed > 0 for curve in [*device.flops.values(), *device.bytes.values()] for _, speed in curve)
    assert set(device.call) == {"model", "training", "backward"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert calibrate.calibrated() is None
