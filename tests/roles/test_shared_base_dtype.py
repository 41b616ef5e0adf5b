"""Adapters on a bf16 base: they train in fp32, compute in bf16, and keep no fp32 copy of their inputs."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM

from perl.measure.memory import LiveBytes
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora, random_llama

RANK, ROWS, LENGTH, HIDDEN, MLP = 4, 2, 16, 64, 96
llama = partial(random_llama, vocab_size=50, hidden_size=HIDDEN, intermediate_size=MLP, initializer_range=0.1)


def policy_on(lm: LlamaForCausalLM, dropout: float = 0.0) -> SharedBase:
    roles = SharedBase(lora(lm, RANK, 8, dropout=dropout))
    roles.add(Role.SFT)
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of(Role.SFT):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    roles.add(Role.POLICY, copy_of=Role.SFT)
    roles.train_only(Role.POLICY)
    return roles


def batch() -> tuple[Tensor, Tensor]:
    ids_BL = torch.randint(3, 50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    return ids_BL, torch.ones(ROWS, LENGTH, dtype=torch.bool)


def loss_of(roles: SharedBase) -> Tensor:
    return -roles(Role.POLICY, *batch(), completion_length=8, temperature=1.0).log_probs_BT.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_and_heads_are_fp32_on_any_base(dtype: torch.dtype) -> None:
    roles = policy_on(llama(dtype))
    roles.add(Role.REWARD, head=True)
    learned = roles.parameters_of(Role.SFT, Role.POLICY, Role.REWARD)
    assert {parameter.dtype for parameter in learned} == {torch.float32}
    assert {p.dtype for n, p in roles.lm.named_parameters() if "lora_" not in n} == {dtype}


def test_adapters_learn_in_fp32_what_bf16_would_round_away() -> None:
    roles = policy_on(llama(torch.bfloat16))
    optimizer = torch.optim.AdamW(roles.train_only(Role.POLICY), lr=1e-5, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in roles.parameters_of(Role.POLICY)]
    loss_of(roles).backward()
    assert {parameter.grad.dtype for parameter in roles.parameters_of(Role.POLICY)} == {torch.float32}
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert {moment.dtype for moment in moments} == {torch.float32}
    moved, lost = 0, 0
    for parameter, start in zip(roles.parameters_of(Role.POLICY), before, strict=True):
        moved += int((parameter != start).sum())
        lost += int((parameter.bfloat16() == start.bfloat16()).sum())
    total = sum(start.numel() for start in before)
    assert moved > 0.95 * total
    assert lost > 0.9 * total


def saved_of(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the tensors that autograd saves in a forward pass, except parameters."""
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    return [tensor for tensor in kept if not isinstance(tensor, nn.Parameter)]


def test_an_adapted_layer_keeps_no_fp32_copy_of_its_input() -> None:
    roles = policy_on(llama(torch.bfloat16))
    layer = roles.lm.model.layers[0].mlp.gate_proj
    x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with roles.role(Role.POLICY):
        kept = saved_of(layer, x)
        assert layer(x).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    # Of the input the one copy that there is anyway.
    inputs = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
    assert inputs == {x.untyped_storage().data_ptr()}


def test_an_adapted_layer_keeps_what_can_be_counted_by_hand() -> None:
    roles = policy_on(llama(torch.bfloat16))
    layer = roles.lm.model.layers[0].mlp.gate_proj
    x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with roles.role(Role.POLICY), LiveBytes() as live:
        y = layer(x)
    tokens = ROWS * LENGTH
    result = 2 * tokens * MLP
    between = 2 * tokens * RANK
    assert live.current == result + between
    assert live.peak <= live.current + 2 * (RANK * HIDDEN + MLP * RANK)  # the factors in bf16; one result only
    assert y.dtype == torch.bfloat16


def test_a_frozen_adapter_keeps_nothing() -> None:
    roles = policy_on(llama(torch.bfloat16))
    layer = roles.lm.model.layers[0].mlp.gate_proj
    x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.bfloat16)
    with roles.role(Role.SFT), LiveBytes() as live:
        y = layer(x)
    assert live.current == y.nbytes == 2 * ROWS * LENGTH * MLP


def biggest_fp32(roles: SharedBase) -> int:
    """Return the number of elements of the largest fp32 tensor that the blocks save for the backward pass."""
    kept: list[Tensor] = []
    x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=roles.lm.dtype, requires_grad=True)
    block = roles.lm.model.layers[0]
    angles = roles.lm.model.rotary_emb(x, torch.arange(LENGTH)[None])
    with (
        roles.role(Role.POLICY),
        saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        block.mlp(x)
        block.self_attn(x, position_embeddings=angles, attention_mask=None)
    found = [tensor for tensor in kept if tensor.dtype == torch.float32 and not isinstance(tensor, nn.Parameter)]
    return max((tensor.numel() for tensor in found), default=0)


def test_attention_and_mlp_of_a_block_keep_activations_in_bf16_only() -> None:
    roles = policy_on(llama(torch.bfloat16))
    # Attention's log-sum-exp (rows x heads x positions) may be fp32; a state (rows x positions x width) may not.
    assert biggest_fp32(roles) <= ROWS * LENGTH * 4 < ROWS * LENGTH * HIDDEN
    assert biggest_fp32(policy_on(llama(torch.float32))) >= ROWS * LENGTH * HIDDEN


def test_bf16_comes_close_to_fp32() -> None:
    lm = llama(torch.bfloat16)
    exact_lm = llama(torch.float32)
    exact_lm.load_state_dict({name: weight.float() for name, weight in lm.state_dict().items()})
    roles, exact = policy_on(lm), policy_on(exact_lm)
    loss, exact_loss = loss_of(roles), loss_of(exact)
    torch.testing.assert_close(loss, exact_loss, rtol=0.01, atol=0.0)
    plain = -exact(Role.BASE, *batch(), completion_length=8, temperature=1.0).log_probs_BT.mean()
    assert (plain - exact_loss).abs() > 0.05  # the adapter does something
    loss.backward()
    exact_loss.backward()
    for got, want in zip(roles.parameters_of(Role.POLICY), exact.parameters_of(Role.POLICY), strict=True):
        difference = float((got.grad - want.grad).norm() / want.grad.norm())
        assert difference < 0.1
        assert want.grad.norm() > 0


def test_an_fp32_base_computes_as_before() -> None:
    """Casting to the existing dtype changes no bit."""
    roles = policy_on(llama(torch.float32))
    layer = roles.lm.model.layers[0].mlp.gate_proj
    x = torch.randn(ROWS, LENGTH, HIDDEN)
    factors = {name: getattr(layer, f"lora_{name}")[Role.POLICY].weight for name in "AB"}
    with roles.role(Role.POLICY):
        expected = layer.base_layer(x) + (x @ factors["A"].T @ factors["B"].T) * (8 / RANK)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
