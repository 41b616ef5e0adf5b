"""A tiny Llama: its shape, and reproducible random weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from perl.adapters import ADAPTERS, AdapterKind
from perl.adapters.lora import Lora
from perl.recipe.adapter import LoraSettings
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase

LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}


def random_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Return a Llama with the same weights at every call; `changes` replace or add keys of the shape.

    Weights are larger than transformers' default, so that outputs of models differ. It seeds torch's generator.
    """
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "initializer_range": 0.2, **changes})).to(dtype)


def lora(lm: PreTrainedModel, rank: int = 4, alpha: float = 8, **settings: Any) -> Lora:
    """Return LoRA on all linear layers, unless other settings are given."""
    return Lora(lm, LoraSettings(rank=rank, alpha=alpha, **settings))


def policy_and_critic(lm: PreTrainedModel, layers: str | list[int] = "all") -> SharedBase:
    """Return a policy and a critic with a head, both trainable; their adapters differ from the initial ones."""
    roles = SharedBase(lora(lm, 4, 8, layers=layers))
    roles.add(Role.POLICY)
    roles.add(Role.CRITIC, head=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of(Role.POLICY, Role.CRITIC):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    roles.train_only(Role.POLICY, Role.CRITIC)
    return roles


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 4, "alpha": 8},
    "dora": {"rank": 4, "alpha": 8},
    "ia3": {},
    "vera": {"rank": 8},
    "miss": {"rank": 6},
    "series": {"bottleneck": 8},
    "parallel": {"bottleneck": 8},
    "tinylora": {"size": 5},
    "prefix": {"length": 3},
}
"""Settings of every kind of adapter for models of this size."""


def adapter_of_kind(lm: PreTrainedModel, kind: str, **settings: Any) -> AdapterKind:
    """Return small adapters of a kind; `settings` replace or add to the defaults."""
    row = ADAPTERS[kind]
    named = {} if kind == "lora" else {"kind": kind}
    return row(lm, row.settings_type.model_validate({**named, **KINDS[kind], **settings}))
