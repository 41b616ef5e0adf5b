"""Decoders: models whose computation is not supported are refused, and blocks are found."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from perl.adapters.targets import layer_index
from perl.backbones import backbone_of
from perl.errors import UserError
from perl.roles.shared_base import SharedBase
from tests.tiny import adapter_of_kind, lora, random_llama


def test_a_model_that_changes_its_logits_is_refused() -> None:
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.tanh()
            return output

    plain = random_llama(torch.float32)
    lm = Capped(plain.config)
    lm.load_state_dict(plain.state_dict())
    backbone = backbone_of(lm.config)
    backbone.check(plain, "base.model tiny")
    with pytest.raises(UserError, match=r"base\.model tiny: Capped transforms its logits"):
        backbone.check(lm, "base.model tiny")


def test_blocks_are_found_wherever_the_trunk_has_them() -> None:
    config = OPTConfig(
        vocab_size=50,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    lm = OPTForCausalLM(config)
    assert backbone_of(config).blocks(lm) == list(lm.model.decoder.layers)
    lm.model.decoder.layers = nn.ModuleList(list(lm.model.decoder.layers)[:2])
    with pytest.raises(UserError, match="OPTForCausalLM has no list of 3 blocks"):
        backbone_of(config).blocks(lm)


RECURRENT: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.2}


@pytest.mark.parametrize("name", ["mamba", "rwkv", "xlstm", "jamba", "lfm2", "openai-gpt"])
def test_generation_without_a_cache_of_keys_and_values_is_refused(name: str) -> None:
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2} if name == "lfm2" else {}
    config = AutoConfig.for_model(name, **layers)
    with pytest.raises(UserError, match=f"base.model tiny: .* but models of type {name} have a recurrent"):
        backbone_of(config).require("generation", "base.model tiny")


def test_the_layers_of_a_hybrid_decide_whether_it_can_generate() -> None:
    """Granite 4 exists with and without Mamba layers."""
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    attending = AutoConfig.for_model("granitemoehybrid", **shape, layer_types=["attention", "attention"])
    assert backbone_of(attending).refusal("generation", "base.model tiny") is None
    mixed = AutoConfig.for_model("granitemoehybrid", **shape, layer_types=["attention", "mamba"])
    assert backbone_of(mixed).refusal("generation", "base.model tiny") is not None


def test_a_model_that_reads_padding_is_refused() -> None:
    """Rows are padded on the left, so a recurrent model without a mask would read the padding first."""
    config = AutoConfig.for_model(
        "recurrent_gemma", **RECURRENT, intermediate_size=96, num_attention_heads=4, lru_width=32
    )
    backbone = backbone_of(config)
    torch.manual_seed(0)
    lm = backbone.new_model(torch.float32)
    with pytest.raises(UserError, match=r"base\.model tiny: RecurrentGemmaForCausalLM reads padding"):
        backbone.check(lm, "base.model tiny")


def test_a_model_that_fails_when_it_is_tested_is_refused() -> None:
    class Failing(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)[0].logits

    lm = Failing(random_llama(torch.float32).config)
    with pytest.raises(UserError, match=r"Failing does not work like the causal LMs of transformers: Attr"):
        backbone_of(lm.config).check(lm, "base.model tiny")


def test_the_depth_of_a_configuration_that_computes_its_layer_types() -> None:
    config = AutoConfig.for_model("jamba", num_hidden_layers=16)
    assert len(backbone_of(config).with_depth(4).layer_types) == 4


def test_a_model_that_also_reads_images_has_adapters_on_its_language_model_only() -> None:
    """Gemma 3 from 4B on: here its vision tower has as many blocks as its language model."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    text = {**shape, "model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    lm = AutoModelForCausalLM.from_config(config)
    assert {type(block).__name__ for block in backbone_of(config).blocks(lm)} == {"Gemma3DecoderLayer"}
    assert any("vision_tower" in name for name, _ in lm.named_modules())
    for kind, targets in (("lora", "all-linear"), ("prefix", None), ("series", "both")):
        adapter = adapter_of_kind(lm, kind, **({} if targets is None else {"targets": targets}))
        assert {name.partition(".layers.")[0] for name in adapter.adapted} == {"model.language_model"}
        assert {layer_index(name) for name in adapter.adapted} == {0, 1}
    roles = SharedBase(lora(lm))
    assert roles.coverage.share == 1
    assert not roles.coverage.without
