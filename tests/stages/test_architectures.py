"""Architectures that differ from Llama in one respect: RL on each, with preflight passing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from perl.rl.collector import read_completions
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.conftest import RunCli, WriteRecipe
from tests.tiny import LLAMA, lora

ALIBI: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def mixtral() -> PreTrainedModel:
    """Return a Mixtral with transformers' default weights; with larger ones, bf16 rounding changes the routing."""
    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2))


def bloom() -> PreTrainedModel:
    """Return a BLOOM, which adds ALiBi, counted over the mask, to its attention scores."""
    return BloomForCausalLM(BloomConfig(**ALIBI))


def falcon() -> PreTrainedModel:
    """Return a Falcon with ALiBi and without RoPE, like Falcon-RW."""
    return FalconForCausalLM(FalconConfig(**ALIBI, alibi=True, multi_query=False, parallel_attn=False, bias=True))


def granite() -> PreTrainedModel:
    """Return a Granite, which divides its logits."""
    return GraniteForCausalLM(GraniteConfig(**LLAMA, initializer_range=0.2, logits_scaling=3.0))


def cohere() -> PreTrainedModel:
    """Return a Cohere, which multiplies its logits."""
    return CohereForCausalLM(CohereConfig(**LLAMA, initializer_range=0.2, logit_scale=0.3))


def gemma2() -> PreTrainedModel:
    """Return a Gemma 2, which caps its logits."""
    config = Gemma2Config(**LLAMA, initializer_range=0.2, head_dim=8, final_logit_softcapping=4.0)
    return Gemma2ForCausalLM(config)


@pytest.fixture
def write_base(tiny_llama: Path, tmp_path: Path) -> Callable[[Callable[[], PreTrainedModel]], Path]:
    """Write a model with reproducible weights and the tokenizer of the tiny Llama."""

    def write(make: Callable[[], PreTrainedModel]) -> Path:
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return write


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(make, dtype, marks=[pytest.mark.slow] * (other == number % 2))
        for number, make in enumerate((mixtral, bloom, falcon, granite, cohere, gemma2))
        for other, dtype in enumerate(("float32", "bfloat16"))
    ],
)
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


@pytest.mark.parametrize("make", [bloom, falcon, granite, cohere, gemma2])
def test_what_is_sampled_is_what_the_model_says(make: Callable[[], PreTrainedModel]) -> None:
    """The sampler's log-probs, those used in training, and those of the model's own logits are equal."""
    torch.manual_seed(0)
    lm = make().eval()
    with torch.no_grad():
        for bias in (weight for name, weight in lm.named_parameters() if name.endswith("bias")):
            bias.normal_(std=0.1)
    roles = SharedBase(lora(lm, 4, 8)).eval()
    roles.add(Role.POLICY)
    for parameter in roles.parameters_of(Role.POLICY):
        parameter.data.normal_(std=0.1)
    prompts = [torch.randint(3, 250, (length,)).tolist() for length in (3, 20, 9, 1)]
    sampling = Sampling(max_new_tokens=70, temperature=0.7, end_ids=(), pad_id=0, prompts_at_once=2)
    samples = LocalSampler(roles).draw(Role.POLICY, prompts, sampling, torch.Generator().manual_seed(0))
    read_BT, _ = read_completions(roles, Role.POLICY, samples, 4, temperature=0.7, head=None)
    torch.testing.assert_close(samples.sampler_log_probs_BT, read_BT, rtol=1e-4, atol=1e-4)
    with roles.role(Role.POLICY), torch.no_grad():
        for prompt, answer, drawn_T in zip(
            prompts, samples.completions(), samples.sampler_log_probs_BT, strict=True
        ):
            logits_TV = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            own_T = (logits_TV / 0.7).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(drawn_T, own_T, rtol=1e-4, atol=1e-4)
