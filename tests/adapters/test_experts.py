"""Adapters on experts of random Mixtral, Qwen3-MoE and gpt-oss equal merged weights exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from perl.backbones.base import weights_sha256
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE
from perl.roles.export_formats import merge, save_adapter
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
RANK = 3
"""A rank that the kernels for experts do not support directly."""


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))


def qwen3_moe() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=16, head_dim=8))


def gpt_oss() -> PreTrainedModel:
    """Return a gpt-oss, whose experts have biases and transposed matrices."""
    lm = GptOssForCausalLM(GptOssConfig(**SHAPE, num_local_experts=4, head_dim=8))
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return lm


def odd_mixtral() -> PreTrainedModel:
    """Return a Mixtral with widths that torch's kernel for experts does not support."""
    return MixtralForCausalLM(MixtralConfig(**SHAPE | {"intermediate_size": 50}, num_local_experts=4))


@pytest.fixture(params=[mixtral, qwen3_moe, gpt_oss, odd_mixtral], ids=lambda make: make.__name__)
def lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = request.param()
    if request.param is odd_mixtral:  # the model's own choice would fail without an adapter
        made.set_experts_implementation("eager")
    return made


def roles_on(lm: PreTrainedModel, targets: str | list[str] = "all-linear") -> SharedBase:
    """Return two roles with random adapters."""
    roles = SharedBase(lora(lm, RANK, 6, targets=targets))
    for role in (Role.SFT, Role.POLICY):
        roles.add(role)
        for parameter in roles.weights(role).values():
            parameter.data.normal_(0, 0.1)
    return roles


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 60, (3, 9), generator=generator), torch.ones(3, 9, dtype=torch.bool)


def log_probs(roles: SharedBase, role: Role) -> Tensor:
    found = roles(role, *batch(), completion_length=4, temperature=1.0).log_probs_BT
    assert found is not None
    return found


def plain_log_probs(lm: PreTrainedModel) -> Tensor:
    ids_BL, _ = batch()
    logits = lm(ids_BL).logits[:, -5:-1].float().log_softmax(-1)
    return logits.gather(-1, ids_BL[:, -4:, None])[..., 0]


def test_every_role_computes_as_its_merged_weights(lm: PreTrainedModel) -> None:
    fresh, untouched = copy.deepcopy(lm), plain_log_probs(lm)
    roles = roles_on(lm)
    for role in (Role.SFT, Role.POLICY, Role.SFT):
        merged = merge(copy.deepcopy(fresh), roles, role)
        torch.testing.assert_close(log_probs(roles, role), plain_log_probs(merged), rtol=1e-5, atol=1e-5)
        assert (log_probs(roles, role) - untouched).abs().max() > 0.01
    torch.testing.assert_close(log_probs(roles, Role.BASE), untouched, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_gradients_are_those_of_the_merged_weights(lm: PreTrainedModel, checkpointing: bool) -> None:
    """dL/dA and dL/dB follow from dL/dW of the merged weights W + s B A, and other roles get no gradients."""
    merged = copy.deepcopy(lm)
    roles = roles_on(lm)
    roles.train_only(Role.POLICY)
    with roles.checkpointed(checkpointing):
        found = log_probs(roles, Role.POLICY)
        log_probs(roles, Role.SFT)  # another role computes between forward and backward
        found.sum().backward()
    merge(merged, roles, Role.POLICY).requires_grad_(True)
    plain_log_probs(merged).sum().backward()
    scale = 6 / RANK
    for layer in range(2):
        for inner, name in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
            at = f"model.layers.{layer}.mlp.experts"
            weight = merged.get_parameter(f"{at}.{name}")
            assert weight.grad is not None
            grad_EOI = weight.grad.mT if "GptOss" in type(lm).__name__ else weight.grad
            a, b = (roles.weights(Role.POLICY)[f"{at}.{inner}lora_{factor}.weight"] for factor in "AB")
            a_ERI, b_EOR = a.view(4, RANK, -1), b.view(b.shape[0], RANK, 4).permute(2, 0, 1)
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad.view(4, RANK, -1), scale * b_EOR.mT @ grad_EOI, rtol=1e-4, atol=1e-5)
            expected = (scale * grad_EOI @ a_ERI.mT).permute(1, 2, 0).reshape(b.shape)
            torch.testing.assert_close(b.grad, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in roles.weights(Role.SFT).values())
    assert all(p.grad is None for name, p in lm.named_parameters() if "lora_" not in name)


def test_what_is_learned_is_not_rounded_to_the_weights_of_a_bf16_base() -> None:
    """The changes are below each weight's last bit but add up over the inputs; merged into W they would vanish."""
    width = 1024
    lm = MixtralForCausalLM(MixtralConfig(**SHAPE | {"hidden_size": width}, num_local_experts=4)).bfloat16()
    experts = lm.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj.copy_(experts.gate_up_proj.sign() * 0.02)
    roles = roles_on(lm, ["gate_up_proj"])
    weights = roles.weights(Role.POLICY)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    direction = torch.randn(width).sign()
    a, b = (weights[f"model.layers.0.mlp.experts.lora_{factor}.weight"] for factor in "AB")
    a.data.copy_(direction.expand_as(a))
    b.data.fill_(2e-5 / (2 * RANK))
    chosen = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).bfloat16()
    with roles.role(Role.POLICY):
        adapted = lm.model.layers[0].mlp.experts(direction[None].bfloat16(), *chosen)
    assert (adapted != experts(direction[None].bfloat16(), *chosen)).any()


def test_the_base_keeps_its_bytes_and_its_modules(lm: PreTrainedModel) -> None:
    before, modules = weights_sha256(lm), [type(module) for module in lm.modules()]
    roles = roles_on(lm)
    roles.train_only(Role.POLICY)
    log_probs(roles, Role.POLICY).sum().backward()
    assert roles.base_sha256() == before
    roles.adapter.remove()
    assert weights_sha256(lm) == before
    assert [type(module) for module in lm.modules()] == modules


@pytest.mark.parametrize("layers", ["all", "top-half"])
def test_plain_peft_loads_what_is_exported(lm: PreTrainedModel, layers: str, tmp_path: Path) -> None:
    fresh = copy.deepcopy(lm)
    roles = SharedBase(lora(lm, RANK, 6, layers=layers))
    roles.add(Role.POLICY)
    for parameter in roles.weights(Role.POLICY).values():
        parameter.data.normal_(0, 0.1)
    save_adapter(roles, Role.POLICY, Role.POLICY, "base", tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    assert {name.replace(".default", "") for name, _ in loaded.named_parameters() if "lora_" in name} == names
    torch.testing.assert_close(plain_log_probs(loaded), log_probs(roles, Role.POLICY), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "share", "without"),
    [
        ("all-linear", 0.995, ["mlp.gate"]),
        ("attention", 0.11, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate"]),
        (
            ["down_proj"],
            0.295,
            ["mlp.experts.gate_up_proj", "mlp.gate", *(f"self_attn.{name}_proj" for name in "koqv")],
        ),
    ],
)
def test_coverage(targets: str | list[str], share: float, without: list[str]) -> None:
    lm = mixtral()
    coverage = SharedBase(lora(lm, RANK, 6, targets=targets)).coverage
    assert coverage.share == pytest.approx(share, abs=0.005)
    assert coverage.without == without
    assert ", ".join(without) in str(coverage)


def glm4_moe() -> PreTrainedModel:
    """Return a GLM-4 MoE, whose shared experts are linear layers that peft would take for older experts."""
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **SHAPE, n_routed_experts=4, moe_intermediate_size=16, head_dim=8, n_group=1, first_k_dense_replace=1
        )
    )


def test_shared_experts_and_dense_blocks_have_adapters_beside_the_experts(tmp_path: Path) -> None:
    lm = glm4_moe()
    fresh = copy.deepcopy(lm)
    roles = roles_on(lm)
    wrapped = {name for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    assert wrapped >= {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert wrapped >= {f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert wrapped >= {"model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"}
    ranks = {parameter.shape[0] for name, parameter in roles.weights(Role.POLICY).items() if "lora_A" in name}
    assert ranks == {RANK, 4 * RANK}, "of a layer, and of four experts"
    merged = merge(fresh, roles, Role.POLICY)
    torch.testing.assert_close(log_probs(roles, Role.POLICY), plain_log_probs(merged), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="peft would apply this adapter to other modules"):
        save_adapter(roles, Role.POLICY, Role.POLICY, "base", tmp_path)


def test_an_engine_that_gathers_layer_by_layer_is_refused() -> None:
    class LayerByLayer(Engine):
        hooks_layers = True

    lm = mixtral()
    with pytest.raises(UserError, match="gathers weights layer by layer"):
        SharedBase(lora(lm, RANK, 6), LayerByLayer(ALONE))
    SharedBase(lora(lm, RANK, 6, targets="attention"), LayerByLayer(ALONE))


def test_dropout_on_experts_is_refused() -> None:
    lm = mixtral()
    with pytest.raises(UserError, match="have no dropout"):
        lora(lm, RANK, 6, dropout=0.1)
    lora(lm, RANK, 6, dropout=0.1, targets="attention")
