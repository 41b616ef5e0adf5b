"""Continuing from the shared blocks changes no result, and is not done where it would."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from perl.roles import split_layers
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.roles.split_layers import LowerLayerCache
from tests.tiny import lora, policy_and_critic, random_llama

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
llama = partial(random_llama, **SHAPE)


def roles_on(lm: LlamaForCausalLM, layers: str | list[int] = "top-half") -> SharedBase:
    return policy_and_critic(lm, layers)


def batch() -> tuple[Tensor, Tensor]:
    """Return three rows padded on both sides."""
    ids_BL = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(2))
    mask_BL = torch.ones(3, 12, dtype=torch.bool)
    mask_BL[1, :4] = mask_BL[2, 9:] = False
    return ids_BL, mask_BL


def loss_and_gradients(roles: SharedBase, lower_hidden_BLD: Tensor | None, checkpointed: bool) -> list[Tensor]:
    ids_BL, mask_BL = batch()
    with roles.checkpointed(checkpointed):
        policy = roles(
            Role.POLICY, ids_BL, mask_BL, completion_length=6, temperature=0.7, lower_hidden_BLD=lower_hidden_BLD
        )
        critic = roles(
            Role.CRITIC, ids_BL, mask_BL, completion_length=6, head=Role.CRITIC, lower_hidden_BLD=lower_hidden_BLD
        ).values_BT
        known = critic.masked_fill(~mask_BL[:, -6:], 0.0)
        loss = policy.log_probs_BT.sum() + policy.entropy_BT.sum() + known.square().sum()
        loss.backward()
    gradients = [parameter.grad for parameter in roles.parameters_of(Role.POLICY, Role.CRITIC)]
    for parameter in roles.parameters_of(Role.POLICY, Role.CRITIC):
        parameter.grad = None
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_all_blocks(dtype: torch.dtype, checkpointed: bool) -> None:
    roles = roles_on(llama(dtype))
    assert roles.shared_blocks == 2
    lower_hidden_BLD = roles.lower_hidden(*batch())
    assert lower_hidden_BLD.dtype == dtype
    assert lower_hidden_BLD.shape == (3, 12, 32)
    split = loss_and_gradients(roles, lower_hidden_BLD, checkpointed)
    whole = loss_and_gradients(roles, None, checkpointed)
    assert len(split) > 1
    for got, want in zip(split, whole, strict=True):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_upper_part_computes_the_upper_blocks_only() -> None:
    roles = roles_on(llama())
    lower_hidden_BLD = roles.lower_hidden(*batch())
    computed = []
    for index, block in enumerate(roles.lm.model.layers):
        block.register_forward_hook(lambda *_, index=index: computed.append(index))
    roles(Role.POLICY, *batch(), completion_length=6, temperature=1.0, lower_hidden_BLD=lower_hidden_BLD)
    assert computed == [2, 3]
    assert len(roles.lm.model.layers) == 4  # put back


@pytest.mark.parametrize(("layers", "count"), [("all", 0), ([3], 3), ([1, 3], 1)])
def test_the_blocks_below_every_adapter_are_shared(layers: str | list[int], count: int) -> None:
    roles = roles_on(llama(), layers)
    assert roles.shared_blocks == count
    assert roles.split_unsupported_reason is None


def test_a_model_that_adds_positions_to_its_embeddings_is_not_split() -> None:
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=4, n_positions=64))
    roles = SharedBase(lora(lm, 4, 8, layers="top-half"))
    assert roles.shared_blocks == 0
    assert roles.split_unsupported_reason == "GPT2LMHeadModel transforms its embeddings before the first block"


def test_a_model_of_layers_of_several_kinds_is_not_split() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Qwen2Config(
        intermediate_size=64, layer_types=kinds, use_sliding_window=True, num_key_value_heads=4, **SHAPE
    )
    lm = Qwen2ForCausalLM(config)
    roles = SharedBase(lora(lm, 4, 8, layers="top-half"))
    assert roles.shared_blocks == 0
    assert "full_attention, sliding_attention" in str(roles.split_unsupported_reason)


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_a_cache_says_what_was_computed(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is in memory or in a file; the second time, batches and padding differ."""
    monkeypatch.setattr(split_layers, "SHARE_OF_FREE_MEMORY", share)
    roles = roles_on(llama(torch.float32))
    ids_BL, mask_BL = batch()
    rows = [ids_L[mask_L].tolist() for ids_L, mask_L in zip(ids_BL, mask_BL, strict=True)]
    cache = LowerLayerCache(roles, rows, 0, tmp_path)
    assert (tmp_path / "lower_hidden.bin").exists() == (share == 0.0)
    first = cache.read([0, 1, 2], mask_BL)
    expected = roles.lower_hidden(ids_BL, mask_BL).masked_fill(~mask_BL[..., None], 0.0)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "other").mkdir()
    other = LowerLayerCache(roles, rows, 0, tmp_path / "other")
    assert torch.equal(other.read([1], mask_BL[[1]])[0], first[1])  # to the bit, whatever is asked for first
    calls = []
    monkeypatch.setattr(SharedBase, "lower_hidden", lambda *_: calls.append(1))
    again = cache.read([2, 1], mask_BL[[2, 1]])
    assert not calls
    assert torch.equal(again[mask_BL[[2, 1]]], first[[2, 1]][mask_BL[[2, 1]]])
    assert again[~mask_BL[[2, 1]]].eq(0).all()
