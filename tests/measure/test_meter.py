"""The meter: attribution of time, tokens, bytes and operations to stages."""

import contextlib
import json
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from perl.measure.cost import Cost
from perl.measure.meter import MEASURED_STEPS, Meter
from perl.measure.probe import PhaseMemory, listeners

CPU = torch.device("cpu")
WEIGHTS = 4 * (64 * 64)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    assert not listeners
    yield
    assert not listeners
    assert not _get_current_dispatch_mode_stack()


class Work:
    """A linear layer in training under a meter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64, bias=False)
        self.optimizer = torch.optim.AdamW(self.layer.parameters())
        self.meter = Meter(CPU, {"adapters": list(self.layer.parameters())}, [self.layer])

    def step(self, tokens: int = 0, seconds: float = 0.0, rows: int = 8) -> None:
        with self.meter.step(self.optimizer):
            with self.meter.phase("generate"), torch.no_grad():
                self.layer(torch.ones(rows, 64))
            self.layer(torch.ones(rows, 64)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.meter.count(tokens)
            time.sleep(seconds)

    def cost(self) -> Cost:
        return self.meter.cost()


def test_gradients_and_the_optimizers_state_are_told_apart() -> None:
    work = Work()
    work.step()
    work.step()
    memory = work.cost().memory
    assert list(memory) == ["load", "generate", "update"]
    assert memory["load"] == PhaseMemory(WEIGHTS, {"adapters": WEIGHTS})
    kinds = memory["update"].kinds
    assert kinds["adapters"] == kinds["gradients"] == WEIGHTS
    assert kinds["optimizer"] == 2 * WEIGHTS + 4  # two moments, and the count of steps
    assert sum(kinds.values()) == memory["update"].peak
    # The second step samples with the optimizer state of the first, and without gradients.
    kinds = memory["generate"].kinds
    assert kinds["optimizer"] == 2 * WEIGHTS + 4
    assert "gradients" not in kinds
    assert kinds["activations"] == 2 * 8 * 64 * 4  # the input and the result
    assert work.cost().peak_memory_bytes == memory["update"].peak


def test_one_step_has_the_optimizers_state_at_its_end_only() -> None:
    work = Work()
    work.step()
    memory = work.cost().memory
    assert "optimizer" not in memory["generate"].kinds
    assert memory["update"].kinds["optimizer"] == 2 * WEIGHTS + 4


def test_operations_of_all_steps_are_those_of_the_followed_by_tokens() -> None:
    work = Work()
    for _ in range(MEASURED_STEPS):
        work.step(tokens=10)
    product = 2 * 8 * 64 * 64  # sampling, forward, and backward of the weight
    assert work.cost().flops == MEASURED_STEPS * 3 * product
    work.step(tokens=100, rows=80)  # not followed
    assert work.cost().flops == MEASURED_STEPS * 3 * product + 10 * 3 * product
    assert work.cost().useful_flops_share == 1.0


def test_a_resumed_stage_has_done_the_operations_of_all_its_processes() -> None:
    whole, first, second = Work(), Work(), Work()
    for _ in range(2 * MEASURED_STEPS):
        whole.step(tokens=10)
    for _ in range(MEASURED_STEPS):
        first.step(tokens=10)
    second.meter.resume_from(json.loads(json.dumps(first.meter.times())))
    assert second.cost().memory == first.cost().memory, "even if no step is left"
    for _ in range(MEASURED_STEPS):
        second.step(tokens=10)
    assert second.cost().flops == whole.cost().flops
    assert second.cost().useful_flops_share == 1.0


def test_without_steps_or_tokens_nothing_is_divided_by_zero() -> None:
    cost = Work().cost()
    assert cost.seconds == cost.tokens_per_second == cost.flops == 0
    assert cost.memory == {"load": PhaseMemory(WEIGHTS, {"adapters": WEIGHTS})}
    work = Work()
    work.step()
    assert work.cost().tokens_per_second == 0


def test_later_steps_change_neither_memory_nor_operations() -> None:
    work = Work()
    for _ in range(MEASURED_STEPS):
        work.step()
    before = work.cost()
    with work.meter.step(work.optimizer):
        assert not listeners
        assert not _get_current_dispatch_mode_stack()
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    after = work.cost()
    for name in ("memory", "peak_memory_bytes", "useful_flops_share"):
        assert getattr(after, name) == getattr(before, name)
    assert work.meter._flops.total == 2 * 3 * 2 * 8 * 64 * 64


def test_the_first_steps_are_followed_and_then_let_go() -> None:
    work = Work()
    with work.meter.step(work.optimizer):
        assert len(listeners) == 2
        assert len(_get_current_dispatch_mode_stack()) == 2
    assert not listeners
    assert not work.layer.weight._post_accumulate_grad_hooks
    assert not work.layer._forward_pre_hooks


@pytest.mark.parametrize("where", ["update", "generate"])
def test_an_exception_leaves_nothing_listening_and_the_next_step_counts(where: str) -> None:
    work = Work()
    with (
        pytest.raises(ZeroDivisionError),
        work.meter.step(work.optimizer),
        work.meter.phase("generate") if where == "generate" else contextlib.nullcontext(),
    ):
        _ = 1 / 0
    assert not listeners
    assert not _get_current_dispatch_mode_stack()
    assert not work.layer.weight._post_accumulate_grad_hooks
    work.step()
    work.step()
    assert work.cost().memory["update"].kinds["gradients"] == WEIGHTS


def test_phases_seconds_sum_to_the_steps() -> None:
    work = Work()
    for _ in range(3):
        with work.meter.step(work.optimizer):
            with work.meter.phase("generate"):
                time.sleep(0.02)
            with work.meter.phase("score"):
                time.sleep(0.04)
                with work.meter.phase("generate"):
                    time.sleep(0.02)
            time.sleep(0.02)
    cost = work.cost()
    phases = cost.phase_seconds
    assert set(phases) == {"generate", "score", "update"}
    assert sum(phases.values()) == pytest.approx(cost.seconds, abs=0.03)
    assert phases["generate"] >= 3 * 0.04 - 0.01
    assert phases["score"] >= 3 * 0.04 - 0.01
    assert phases["update"] >= 3 * 0.02 - 0.01
    assert cost.seconds >= 3 * 0.1 - 0.01


def test_what_lies_before_and_between_steps_is_no_phases_time() -> None:
    work = Work()
    for _ in range(3):
        time.sleep(0.1)
        work.step()
    cost = work.cost()
    assert "load" not in cost.phase_seconds
    assert sum(cost.phase_seconds.values()) == pytest.approx(cost.seconds, abs=0.02)
    assert cost.seconds < 0.3


def test_the_speed_leaves_the_followed_steps_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    work = Work()
    for seconds in (10.0, 8.0):
        work.step(tokens=100, seconds=seconds)
    assert work.cost().tokens_per_second == round(200 / 18, 1)  # there are no others yet
    work.step(tokens=90, seconds=2.0)
    work.step(tokens=60, seconds=1.0)
    assert work.cost().tokens_per_second == 50.0
    assert work.cost().seconds == 21.0
    assert work.cost().phase_seconds == {"update": 21.0, "generate": 0.0}
