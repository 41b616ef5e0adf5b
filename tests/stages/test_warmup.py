"""The learning rate schedule of SFT and reward training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from tests.conftest import RunCli, WriteRecipe

RATE = 0.01
STEPS = 16
"""Steps of the SFT below: 8 training demonstrations, two per step, four epochs."""


def rates(name: str, warmup: int) -> list[float]:
    """Return the expected learning rate of each step."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    schedule = get_scheduler(name, optimizer, warmup, STEPS)
    found = []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def sft(run_cli: RunCli, write_recipe: WriteRecipe, data: Path, out: Path, **more: Any) -> list[float]:
    """Train only SFT; return each step's learning rate from its metrics."""
    recipe = write_recipe(
        reward=None,
        rl=None,
        sft={"epochs": 4, "batch_size": 2, "learning_rate": RATE, "max_length": 64, **more},
        data={"source": "jsonl", "path": str(data / "demonstrations.jsonl"), "held_out": 0.2},
    )
    status, written = run_cli("run", recipe, "--out", out)
    assert status == 0, written
    lines = (out / "sft" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["learning_rate"] for line in lines]


@pytest.mark.parametrize(
    ("more", "name", "warmup"),
    [
        ({}, "cosine", 1),  # a tenth of the steps, rounded down
        ({"warmup_ratio": 0.05}, "cosine", 0),  # and the first step is not lost to a rate of 0
        ({"warmup_ratio": 0.5, "lr_scheduler_type": "linear"}, "linear", 8),
        ({"warmup_ratio": 0.25, "lr_scheduler_type": "constant_with_warmup"}, "constant_with_warmup", 4),
        ({"lr_scheduler_type": "constant"}, "constant", 0),
        ({"warmup_ratio": 0.25, "lr_scheduler_type": "inverse_sqrt"}, "inverse_sqrt", 4),
    ],
)
def test_the_rate_of_every_step(
    more: dict[str, Any],
    name: str,
    warmup: int,
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    small_data: Path,
    tmp_path: Path,
) -> None:
    actual = sft(run_cli, write_recipe, small_data, tmp_path / "out", **more)
    assert actual == pytest.approx(rates(name, warmup), rel=1e-6)


def test_weight_decay_shrinks_the_weights(
    run_cli: RunCli, write_recipe: WriteRecipe, small_data: Path, tmp_path: Path
) -> None:
    sizes = []
    for decay in (0.0, 1.0):
        out = tmp_path / str(decay)
        sft(run_cli, write_recipe, small_data, out, weight_decay=decay)
        tensors = load_file(out / "sft" / "adapter" / "adapter_model.safetensors")
        sizes.append(sum(float(tensor.norm()) for name, tensor in tensors.items() if "lora_A" in name))
    assert sizes[1] < 0.99 * sizes[0]
