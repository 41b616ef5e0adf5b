"""Architectures that do one thing unlike Llama: RL on each, whose preflight finds nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from tests.conftest import RunCli, WriteRecipe
from tests.tiny import LLAMA


def mixtral() -> PreTrainedModel:
    """Weights as transformers draws them: of larger ones rounding to bf16 makes the router choose others."""
    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2))


@pytest.fixture
def write_base(tiny_llama: Path, tmp_path: Path) -> Callable[[Callable[[], PreTrainedModel]], Path]:
    """Write a model, the same at every call, with the tokenizer of the tiny Llama."""

    def write(make: Callable[[], PreTrainedModel]) -> Path:
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [mixtral])
def test_rl_passes_its_preflight(
    make: Callable[[], PreTrainedModel],
    dtype: str,
    write_base: Callable[[Callable[[], PreTrainedModel]], Path],
    write_recipe: WriteRecipe,
    run_cli: RunCli,
    tmp_path: Path,
) -> None:
    file = write_recipe(base={"model": str(write_base(make)), "dtype": dtype}, reward=None)
    code, text = run_cli("run", file, "--out", tmp_path / "out")
    assert code == 0, text
    rl = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["rl"]
    assert {"base unchanged", "temperature", "sampled as read"} <= {check["name"] for check in rl["preflight"]}
    assert rl["incidents"] == []
