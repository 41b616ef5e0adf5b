"""Decoders: models that compute in a way that is not known are refused, and blocks are found."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from perl.backbones import backbone_of
from perl.errors import UserError
from tests.tiny import random_llama


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
    with pytest.raises(UserError, match=r"base\.model tiny: Capped changes its logits"):
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
