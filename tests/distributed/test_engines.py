"""Several processes under every engine: the losses, gradients and final adapters of one, on the same batches."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import finished, learned, steps, torchrun

CLOSE = 1e-5
STAGES = {"all": ("sft", "reward", "policy")}
LORA = ("all", "adapter", "reinforce", "rloo")
LAUNCHES = [
    pytest.param("ddp", 2, (*LORA, "full"), id="ddp-2"),
    pytest.param("ddp", 4, ("all",), id="ddp-4", marks=pytest.mark.slow),
    pytest.param("zero2", 2, ("all",), id="zero2-2"),
    pytest.param("zero3", 2, ("all", "adapter"), id="zero3-2"),
    pytest.param("zero3-offload", 2, ("adapter",), id="zero3-offload-2"),
    pytest.param("fsdp2", 2, ("all", "adapter"), id="fsdp2-2"),
    *(
        pytest.param(engine, 4, LORA, id=f"{engine}-4", marks=pytest.mark.slow)
        for engine in ("zero2", "zero3", "zero3-offload", "fsdp2")
    ),
]


@pytest.mark.parametrize(("engine", "count", "names"), LAUNCHES)
def test_processes_together_do_what_one_does_alone(
    engine: str,
    count: int,
    names: tuple[str, ...],
    recipes: dict[str, Path],
    alone: dict[str, Path],
    tmp_path: Path,
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    pairs = [f"{recipes[name]}={tmp_path / name}" for name in names]
    status, said = finished(torchrun(count, "-m", "tests.distributed.worker", *pairs, engine=engine))
    assert status == 0, said
    for name in names:
        for role in STAGES.get(name, ("policy",)):
            _same_steps(steps(alone[name], role), steps(tmp_path / name, role), f"{name} {role}")
        one, several = learned(alone[name]), learned(tmp_path / name)
        assert one.keys() == several.keys()
        for tensor in one:
            torch.testing.assert_close(several[tensor], one[tensor], rtol=0, atol=CLOSE, msg=f"{name}: {tensor}")
        hardware = json.loads((tmp_path / name / "report.json").read_text())["hardware"]
        assert (hardware["processes"], hardware["engine"]) == (count, engine.removesuffix("-offload"))


def _same_steps(one: list[dict[str, float]], several: list[dict[str, float]], where: str) -> None:
    """Every figure of every step: losses, the gradient's norm, rewards and KL among them."""
    assert len(one) == len(several)
    for before, after in zip(one, several, strict=True):
        assert before.keys() == after.keys()
        for figure, value in before.items():
            if figure in ("entropy", "mean_token_accuracy", "num_tokens") and "learning_rate" in before:
                continue  # TRL's own, of shares
            assert after[figure] == pytest.approx(value, rel=CLOSE, abs=CLOSE), f"{where}: {figure}"
