"""Counted operations against numbers worked by hand: a multiply and an add are two."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perl.measure.flops import Flops
from perl.measure.probe import listeners, listening, recomputing
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import LLAMA, lora, random_llama


def counted(flops: Flops) -> tuple[float, float]:
    return flops.total, flops.useful


def test_a_linear_layers_forward_and_backward() -> None:
    layer, x = nn.Linear(5, 3), torch.ones(7, 5)
    flops = Flops([])
    with flops.counting():
        y = layer(x)
        assert counted(flops) == (2 * 7 * 5 * 3, 2 * 7 * 5 * 3)
        y.sum().backward()  # of the weight only: the input needs no gradient
    assert flops.total == 2 * (2 * 7 * 5 * 3)
    with flops.counting():
        layer(x.requires_grad_()).sum().backward()  # and again, of the input too
    assert flops.total == (2 + 3) * (2 * 7 * 5 * 3)


def test_a_frozen_layer_under_an_adapter_has_no_weight_gradient() -> None:
    base = nn.Linear(16, 16, bias=False).requires_grad_(False)
    down, up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
    x = torch.ones(4, 16, requires_grad=True)
    flops = Flops([])
    with flops.counting():
        (base(x) + up(down(x))).sum().backward()
    large, small = 2 * 4 * 16 * 16, 2 * 4 * 16 * 2
    assert flops.total == 2 * large + 3 * 2 * small


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu(causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    if causal:
        query = torch.randn(2, 3, 7, 8, requires_grad=True)
    product = 2 * 2 * 3 * query.shape[2] * 7 * 8  # queries with keys, of 2 x 3 heads of size 8
    flops = Flops([])
    with flops.counting():
        result = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        assert flops.total == 2 * product  # and their weights with the values
        result.sum().backward()
    # Backward: the weights again, and gradients of weights, values, queries and keys.
    assert flops.total == (2 + 5) * product


def test_nothing_counts_outside() -> None:
    x, flops = torch.ones(4, 4), Flops([])
    x @ x
    with flops.counting():
        x @ x
    x @ x
    assert counted(flops) == (128, 128)


class Trunk(nn.Module):
    """One 4 x 4 product at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.layer(torch.ones(*input_ids.shape, 4) if inputs_embeds is None else inputs_embeds)


def test_useful_is_the_share_of_real_tokens() -> None:
    trunk, ids = Trunk(), torch.zeros(2, 8, dtype=torch.long)
    mask = torch.tensor([[0] * 5 + [1] * 3, [0] * 1 + [1] * 7])  # 10 of 16
    flops = Flops([trunk])
    product = 2 * 4 * 4
    with flops.counting():
        hidden = trunk(input_ids=ids, attention_mask=mask)
        assert counted(flops) == (16 * product, 10 * product)
        hidden.sum().backward()  # of the same share
    assert counted(flops) == (32 * product, 20 * product)
    with flops.counting():
        trunk(input_ids=ids)  # no mask, no padding
    assert counted(flops) == (48 * product, 36 * product)
    trunk(input_ids=ids, attention_mask=mask)
    assert not trunk._forward_pre_hooks


def test_padding_is_seen_however_the_trunk_is_called() -> None:
    """BERT gets its ids by position; above shared blocks, a trunk gets hidden states instead."""
    flops = Flops([trunk := Trunk()])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])  # 5 of 8
    with flops.counting():
        trunk(torch.zeros(2, 4, dtype=torch.long), attention_mask=mask)
        assert counted(flops) == (8 * 32, 5 * 32)
        trunk(inputs_embeds=torch.ones(2, 4, 4), attention_mask=mask)
    assert counted(flops) == (16 * 32, 10 * 32)


def test_with_a_cache_the_mask_is_longer_than_what_is_computed() -> None:
    flops = Flops([trunk := Trunk()])
    product = 2 * 4 * 4
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1]])
    with flops.counting():
        trunk(input_ids=torch.zeros(2, 1, dtype=torch.long), attention_mask=mask)  # a token drawn is real
        assert counted(flops) == (2 * product, 2 * product)
        trunk(input_ids=torch.zeros(2, 2, dtype=torch.long), attention_mask=mask)  # three of the last two columns
    assert counted(flops) == (6 * product, 5 * product)


def test_what_is_computed_again_is_not_useful() -> None:
    x, flops = torch.ones(4, 4), Flops([])
    with flops.counting(), listening(flops):
        x @ x
        with recomputing():
            x @ x
            with recomputing():
                x @ x
            x @ x
        x @ x
    assert counted(flops) == (5 * 128, 2 * 128)
    assert not listeners


HIDDEN, MLP, LAYERS = (LLAMA[size] for size in ("hidden_size", "intermediate_size", "num_hidden_layers"))


def llama_roles() -> SharedBase:
    roles = SharedBase(lora(random_llama(vocab_size=50), 4, 8))
    roles.add(Role.REWARD, head=True)
    roles.train_only(Role.REWARD)
    return roles


def trained(checkpointed: bool) -> tuple[float, float]:
    roles = llama_roles()
    flops = Flops([roles.lm.base_model])
    ids_BL = torch.randint(3, 50, (2, 8))
    mask_BL = torch.ones(2, 8, dtype=torch.bool)
    mask_BL[0, :4] = False  # 12 of 16
    with roles.checkpointed(checkpointed), flops.counting(), listening(flops):
        roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD).scores_B.sum().backward()
    return counted(flops)


def test_checkpointing_adds_operations_and_nothing_useful() -> None:
    plain, again = trained(checkpointed=False), trained(checkpointed=True)
    assert plain[1] == pytest.approx(plain[0] * 12 / 16)
    assert again[1] == pytest.approx(plain[1])
    # All linear layers and attention of all blocks are recomputed, except results that nothing saved of the last
    # operators: checkpointing stops early.
    assert plain[0] < again[0] < 2 * plain[0]


def test_the_operations_of_a_llamas_trunk() -> None:
    roles = llama_roles()
    flops = Flops([roles.lm.base_model])
    ids_BL = torch.randint(3, 50, (2, 8))
    with torch.no_grad(), flops.counting():
        roles.eval()
        with roles.role(Role.BASE):
            roles.trunk(ids_BL, torch.ones(2, 8, dtype=torch.bool))
    linear = 2 * 16 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP)
    attention = 2 * 2 * 2 * 8 * 8 * HIDDEN  # two products of 8 x 8 positions, in 2 rows, over all heads' widths
    assert flops.total == pytest.approx(
        LAYERS * (linear + attention), rel=1e-3
    )  # rotary angles cost almost nothing
