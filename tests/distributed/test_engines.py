"""Several processes with every engine: losses, gradients and final adapters of one process, on equal batches."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed import worker
from tests.distributed.launching import LIMIT, finished, fork, learned, steps, torchrun
from tests.distributed.worker import SAMPLED

CLOSE = 1e-5
LOOSE = {"trpo": 2e-3}
"""Larger tolerances of metrics by recipe, whose weights are not compared: the curvature is a difference of fp32
gradients, and a weight with hardly any gradient follows its rounding."""
STAGES = {"all": ("sft", "reward", "policy")}
LORA = ("all", "adapter", "reinforce", "rloo")
FEW = {
    "ddp": ("all", "rloo", "full"),
    "fsdp2": ("all", "adapter", "series"),
    "zero2": ("all", "trpo", "optimizer"),
    "zero3": ("all", "adapter", "lengths", "vera"),
    "zero3-offload": ("adapter",),
}
"""Recipes and checks of two processes, by engine. DeepSpeed is last because it changes torch's warnings."""
MANY = {
    "ddp": ("all", "adapter"),
    "fsdp2": (*LORA, "lengths", "miss"),
    "zero2": (*LORA, "optimizer"),
    "zero3": (*LORA, "lengths", "ia3", "parallel"),
    "zero3-offload": LORA,
}
"""Recipes and checks of four processes."""
CHECKS = ("lengths", "optimizer")
CASES = [
    *(pytest.param(2, engine, id=f"{engine}-2") for engine in FEW),
    *(pytest.param(4, engine, id=f"{engine}-4", marks=pytest.mark.slow) for engine in MANY),
]


@dataclass(frozen=True)
class Launch:
    """Results of a launch."""

    folder: Path
    status: int
    said: str

    def found(self, engine: str, check: str) -> list[Any]:
        """Return the results of a check in each process."""
        (line,) = (line for line in self.said.splitlines() if line.startswith(f"{engine} {check}: "))
        values: list[Any] = json.loads(line.partition(": ")[2])
        return values


@pytest.fixture(scope="module")
def launches(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Launch]:
    """Return launches by their number of processes, started on first access; each runs all engines.

    torchrun starts four processes per launch. Each launch's last recipe has batches that cannot be divided evenly.
    """
    pytest.importorskip("deepspeed")

    class Launches(dict[int, Launch]):
        def __missing__(self, count: int) -> Launch:
            folder = tmp_path_factory.mktemp(f"launch-{count}")
            arguments: list[str] = []
            for engine, work in (FEW if count == 2 else MANY).items():
                pairs = {name: f"{recipes[name]}={folder / engine / name}" for name in work if name in recipes}
                arguments += [engine, *(pairs.get(name, name) for name in work)]
            content = yaml.safe_load(recipes["all"].read_text())
            content["rl"]["prompts_per_step"] = 3
            uneven = recipes["all"].with_name("uneven.yaml")
            uneven.write_text(yaml.safe_dump(content))
            arguments += ["ddp", f"{uneven}={folder / 'uneven'}"]
            if count == 2:
                left = fork(count, worker.main, *arguments, log=folder / "log").finished(count * LIMIT)
            else:
                left = finished(torchrun(count, "-m", "tests.distributed.worker", *arguments), count * LIMIT)
            self[count] = Launch(folder, *left)
            return self[count]

    return Launches()


@pytest.mark.parametrize(("count", "engine"), CASES)
def test_processes_together_do_what_one_does_alone(
    count: int, engine: str, launches: dict[int, Launch], alone: dict[str, Path]
) -> None:
    launch = launches[count]
    for name in (FEW if count == 2 else MANY)[engine]:
        if name in CHECKS:
            continue
        out = launch.folder / engine / name
        assert (out / "report.json").exists(), launch.said
        for role in STAGES.get(name, ("policy",)):
            _same_steps(steps(alone[name], role), steps(out, role), f"{name} {role}", LOOSE.get(name, CLOSE))
        one, several = learned(alone[name]), learned(out)
        assert one.keys() == several.keys()
        for tensor in one if name not in LOOSE else ():
            torch.testing.assert_close(several[tensor], one[tensor], rtol=0, atol=CLOSE, msg=f"{name}: {tensor}")
        hardware = json.loads((out / "report.json").read_text())["hardware"]
        assert (hardware["processes"], hardware["engine"]) == (count, engine.removesuffix("-offload"))


@pytest.mark.parametrize(
    ("count", "engine"),
    [(2, "zero3"), *(pytest.param(4, engine, marks=pytest.mark.slow) for engine in ("zero3", "fsdp2"))],
)
def test_completions_of_very_different_lengths_never_hang(
    count: int, engine: str, launches: dict[int, Launch]
) -> None:
    found = launches[count].found(engine, "lengths")
    assert len(found) == count
    assert all(shorter > SAMPLED * count / 20 for shorter in found)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sharded_optimizer_is_plain_adamw_of_which_each_process_holds_a_part(
    count: int, launches: dict[int, Launch]
) -> None:
    found = launches[count].found("zero2", "optimizer")
    assert sum(one.pop("held") for one in found) == pytest.approx(1)
    assert all(value < 1e-6 for one in found for value in one.values()), found


def test_a_batch_that_the_processes_cannot_divide_is_refused_once(launches: dict[int, Launch]) -> None:
    launch = launches[2]
    assert launch.status != 0
    assert launch.said.count("3 cannot be divided among 2 processes") == 1
    assert "Set it to 2 or 4, or launch a number of processes that divides 3." in launch.said
    assert not (launch.folder / "uneven").exists()


def _same_steps(one: list[dict[str, float]], several: list[dict[str, float]], where: str, close: float) -> None:
    """Compare all metrics of all steps, such as losses, gradient norm, rewards and KL."""
    assert len(one) == len(several)
    for before, after in zip(one, several, strict=True):
        assert before.keys() == after.keys()
        for figure, value in before.items():
            if figure in ("entropy", "mean_token_accuracy", "num_tokens") and "learning_rate" in before:
                continue  # TRL's own, of shares
            assert after[figure] == pytest.approx(value, rel=close, abs=close), f"{where}: {figure}"
