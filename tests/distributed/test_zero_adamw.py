"""DeepSpeed's optimizer behind ours: plain AdamW's updates and state, and one goes on from the other's."""

import json
import sys

import pytest
import torch

from perl.parallel.joined import joined
from tests.distributed.launching import finished, torchrun


def weights() -> list[torch.nn.Parameter]:
    """Of four shapes."""
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((4, 8), (8, 3), (5,), (1, 7))]


def adamw(learning: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Two groups, as adapters and heads are."""
    return torch.optim.AdamW(
        [{"params": learning[:3], "lr": 1e-2}, {"params": learning[3:], "lr": 1e-1}], weight_decay=0.0
    )


def train(optimizer: torch.optim.Optimizer, learning: list[torch.nn.Parameter], steps: range) -> None:
    """As a loop does, with a schedule."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for weight in learning:
            weight.grad = torch.randn(weight.shape, generator=draw)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
        optimizer.zero_grad()


def difference(one: list[torch.nn.Parameter], other: list[torch.nn.Parameter]) -> float:
    """The largest."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def main() -> None:
    """In several processes: what became of the weights, written as JSON by the main one."""
    with joined() as engine:
        plain, ours = weights(), weights()
        reference, sharded = adamw(plain), engine.optimizer(adamw(ours))
        train(reference, plain, range(3))
        train(sharded, ours, range(3))
        told = {"kind": type(sharded).__name__, "updates": difference(plain, ours)}
        state, expected = sharded.state_dict(), reference.state_dict()
        told["state"] = max(
            float((state["state"][number][name] - tensor).abs().max())
            for number, tensors in expected["state"].items()
            for name, tensor in tensors.items()
        )
        onward = [torch.nn.Parameter(weight.detach().clone()) for weight in plain]
        resumed = engine.optimizer(adamw(onward))
        resumed.load_state_dict(expected)
        train(reference, plain, range(3, 6))
        train(resumed, onward, range(3, 6))
        told["resumed"] = difference(plain, onward)
        if engine.processes.main:
            sys.stdout.write(f"told {json.dumps(told)}\n")


@pytest.mark.parametrize("engine", ["zero2", "zero3-offload"])
def test_it_is_plain_adamw(engine: str) -> None:
    pytest.importorskip("deepspeed")
    status, said = finished(torchrun(2, "-m", "tests.distributed.test_zero_adamw", engine=engine))
    assert status == 0, said
    told = json.loads(next(line for line in said.splitlines() if line.startswith("told "))[5:])
    assert told.pop("kind") == "ZeroAdamW"
    assert all(value < 1e-6 for value in told.values()), told


if __name__ == "__main__":
    main()
