"""A prompt computed once for all its completions gives the same results as when computed for each."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from perl.backbones import backbone_of
from perl.backbones.shared_prompts import KERNEL, Layout, SharedPrompts, unsupported_reason
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import policy_and_critic, random_llama

GROUPS = [4, 4, 4, 1, 1, 7]
"""Three completions of a prompt, two of another and one of a third."""
P, T = 8, 6


def batch() -> tuple[Tensor, Tensor]:
    """Return prompts of 8, 3 and 5 tokens and completions of 1 to 6."""
    ids_BL = torch.randint(3, 50, (6, P + T), generator=torch.Generator().manual_seed(2))
    ids_BL[1:3, :P], ids_BL[4, :P] = ids_BL[0, :P], ids_BL[3, :P]
    mask_BL = torch.ones(6, P + T, dtype=torch.bool)
    for row, (prompt, completion) in enumerate([(8, 6), (8, 1), (8, 4), (3, 5), (3, 2), (5, 3)]):
        mask_BL[row, : P - prompt] = mask_BL[row, P + completion :] = False
    return ids_BL, mask_BL


def roles_on(lm: PreTrainedModel, layers: str = "all") -> SharedBase:
    roles = policy_and_critic(lm, layers)
    roles.shares_prompts = True
    return roles


def outputs_and_gradients(
    roles: SharedBase, prompts: SharedPrompts | None, checkpointed: bool = False
) -> list[Tensor]:
    """Return log-probs, entropies, values and scores, then the gradients of a loss of all of them."""
    ids_BL, mask_BL = batch()
    read = partial(
        roles,
        ids_BL=ids_BL,
        mask_BL=mask_BL,
        lower_hidden_BLD=roles.lower_hidden(ids_BL, mask_BL) if roles.shared_blocks else None,
        prompts=prompts,
    )
    with roles.checkpointed(checkpointed):
        policy = read(Role.POLICY, completion_length=T, temperature=0.7, head=Role.CRITIC)
        scores_B = read(Role.CRITIC, head=Role.CRITIC).scores_B
        values_BT = policy.values_BT.masked_fill(~mask_BL[:, -T:], 0.0)
        outputs = [policy.log_probs_BT, policy.entropy_BT, values_BT, scores_B]
        sum((one * one).mean() for one in outputs).backward()
    parameters = roles.parameters_of(Role.POLICY, Role.CRITIC)
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [*(one.detach() for one in outputs), *gradients]


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**shape | changes))


def qwen3() -> Qwen3ForCausalLM:
    """Return a Qwen3, with grouped queries and normalized queries and keys."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("made", [random_llama, gpt2, qwen3])
def test_outputs_and_gradients_are_those_of_the_plain_pass(made: Any, checkpointed: bool) -> None:
    roles = roles_on(made())
    seen = []
    first_block = backbone_of(roles.lm.config).blocks(roles.lm)[0]
    first_block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    shared = outputs_and_gradients(roles, SharedPrompts.of(GROUPS, T), checkpointed)
    assert set(seen) == {(1, 3 * P + 6 * T)}
    for got, want in zip(shared, outputs_and_gradients(roles, None, checkpointed), strict=True):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_above_shared_blocks_too(checkpointed: bool) -> None:
    roles = roles_on(random_llama(num_hidden_layers=4), "top-half")
    assert roles.shared_blocks == 2
    shared = outputs_and_gradients(roles, SharedPrompts.of(GROUPS, T), checkpointed)
    for got, want in zip(shared, outputs_and_gradients(roles, None, checkpointed), strict=True):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_in_bf16_the_difference_is_rounding() -> None:
    """It is as close to fp32 as the plain pass is."""
    exact = outputs_and_gradients(roles_on(random_llama()), None)
    roles = roles_on(random_llama(torch.bfloat16))
    shared, plain = outputs_and_gradients(roles, SharedPrompts.of(GROUPS, T)), outputs_and_gradients(roles, None)
    errors = [
        sum(float((one - true).norm() / true.norm()) for one, true in zip(found, exact, strict=True))
        for found in (shared, plain)
    ]
    assert errors[0] < 1.2 * errors[1]


def test_a_role_that_does_not_share_computes_every_row() -> None:
    roles, seen = roles_on(random_llama()), []
    roles.lm.model.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    roles.shares_prompts = False
    outputs_and_gradients(roles, SharedPrompts.of(GROUPS, T))
    assert set(seen) == {(6, P + T)}


def test_prompts_that_all_differ_are_not_shared() -> None:
    assert SharedPrompts.of([3, 1, 2], T) is None
    assert SharedPrompts.of(GROUPS, T) == SharedPrompts([0, 3, 5], [0, 0, 0, 1, 1, 2], T)


def test_what_is_packed_is_unpacked() -> None:
    ids_BL, mask_BL = batch()
    layout = Layout(SharedPrompts([0, 3, 5], [0, 0, 0, 1, 1, 2], T), mask_BL, torch.float32)
    packed_1N = layout.pack(ids_BL)
    assert packed_1N.shape == (1, 3 * P + 6 * T)
    assert torch.equal(layout.unpack(packed_1N), ids_BL)


def test_masked_completions_do_not_change_what_others_are_given() -> None:
    """No completion attends to another: different tokens in one do not change the others."""
    roles = roles_on(random_llama())
    ids_BL, mask_BL = batch()
    read = partial(roles, Role.POLICY, mask_BL=mask_BL, completion_length=T, temperature=1.0)
    prompts = SharedPrompts.of(GROUPS, T)
    before_BT = read(ids_BL=ids_BL, prompts=prompts).log_probs_BT
    ids_BL[0, P:] = 3
    after_BT = read(ids_BL=ids_BL, prompts=prompts).log_probs_BT
    assert not torch.allclose(before_BT[0], after_BT[0])
    assert torch.equal(before_BT[1:], after_BT[1:])


def reason(lm: PreTrainedModel) -> str | None:
    return unsupported_reason(backbone_of(lm.config), lm.eval(), list(range(3, 15)), T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_attend_by_transformers_function_share(dtype: torch.dtype) -> None:
    assert reason(random_llama(dtype)) is None
    assert reason(gpt2().to(dtype)) is None


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "in one row"),
        (
            "mistral",
            SMALL | {"intermediate_size": 64, "num_key_value_heads": 4, "sliding_window": 9},
            "last 9 tokens",
        ),
        ("gpt_neo", SMALL | {"num_heads": 4, "attention_types": [[["global"], 2]], "num_layers": 2}, KERNEL),
        ("mamba", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}, "in one row"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused_with_the_reason(
    kind: str, shape: dict[str, Any], expected: str
) -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    assert expected in str(reason(lm))


def test_a_model_whose_attention_changes_the_cached_values_is_refused() -> None:
    """DiffLlama rearranges the values after caching them, so shared prompts would have the old order."""
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("diffllama", **shape, num_attention_heads=4, num_key_value_heads=2)
    lm = AutoModelForCausalLM.from_config(config)
    assert str(reason(lm)).endswith("attention does not use the keys and values exactly as the cache returns them")


def test_a_window_longer_than_the_rows_is_no_obstacle() -> None:
    torch.manual_seed(0)
    shape = SMALL | {"intermediate_size": 64, "num_key_value_heads": 4, "sliding_window": 64}
    assert reason(AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **shape))) is None


def test_a_block_that_mixes_positions_beside_attention_is_refused() -> None:
    lm = random_llama()
    lm.model.layers[0].register_forward_hook(lambda _, inputs, output: output + inputs[0].cumsum(1))
    assert str(reason(lm)).endswith("gives other results for several completions in one row than for each alone")


def test_eager_attention_is_refused() -> None:
    lm = random_llama()
    lm.set_attn_implementation("eager")
    assert "does not use transformers' sdpa attention in every block" in str(reason(lm))
