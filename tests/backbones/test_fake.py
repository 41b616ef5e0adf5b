"""Fake models have the shapes of real ones and no side effects."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaForCausalLM

from perl.backbones.fake import fake_lm, unknown_values
from perl.roles.fake import FakeSeparateModels, FakeSharedBase
from perl.roles.role import Role
from perl.roles.separate_models import SeparateModels
from perl.roles.shared_base import SharedBase
from tests.tiny import LLAMA, lora

WIDER = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(**WIDER, tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fake_model_has_the_shapes_of_a_real_one_and_no_weights(tied: bool) -> None:
    fake, real = fake_lm(config(tied), torch.bfloat16), LlamaForCausalLM(config(tied)).bfloat16()
    assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert {n: b.shape for n, b in fake.named_buffers()} == {n: b.shape for n, b in real.named_buffers()}
    assert all(isinstance(p.data, FakeTensor) for p in (*fake.parameters(), *fake.buffers()))
    assert {p.device.type for p in fake.parameters()} == {"cpu"}
    shared = fake.get_input_embeddings().weight is fake.get_output_embeddings().weight
    assert shared is tied


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_fake_roles_have_the_parameters_of_real_ones(tuning: str) -> None:
    lm, fake = LlamaForCausalLM(config()), fake_lm(config(), torch.float32)
    pair = (
        (SharedBase(lora(lm, 4, 8)), FakeSharedBase(lora(fake, 4, 8)))
        if tuning == "lora"
        else (SeparateModels(lm, lambda: lm), FakeSeparateModels(fake))
    )
    for roles in pair:
        roles.add(Role.SFT)
        roles.keep(Role.SFT)
        roles.add(Role.POLICY, copy_of=Role.SFT)
        roles.add(Role.REWARD, head=True)
        roles.add(Role.CRITIC, copy_of=Role.REWARD, head=True)
        roles.train_only(Role.POLICY, Role.CRITIC)
    real, faked = (
        {n: (p.shape, p.dtype, p.requires_grad, p.is_leaf) for n, p in roles.named_parameters()} for roles in pair
    )
    assert faked == real
    assert all(isinstance(parameter.data, FakeTensor) for parameter in pair[1].parameters())


def test_a_fakes_values_are_zeros_only_where_they_are_asked_for() -> None:
    weight = next(fake_lm(config(), torch.float32).parameters())
    with pytest.raises(Exception, match=r"data-dependent|DataDependent|aten\._local_scalar_dense"):
        weight.sum().item()
    with unknown_values():
        assert weight.detach().sum().item() == 0.0
        assert float(weight.detach().sum()) == 0.0
        assert weight.detach()[:2, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert not (weight.detach().sum() > 1)
        assert torch.multinomial(weight.detach()[:3], 1).tolist() == [[0], [0], [0]]
        assert isinstance(weight.detach() + 1, FakeTensor)


def test_real_tensors_keep_their_values_among_unknown_ones() -> None:
    ids, share = torch.tensor([3, 1, 2]), torch.tensor(0.25)
    with unknown_values():
        assert ids.tolist() == [3, 1, 2]
        assert int(ids[0]) == 3
        assert share.item() == float(share) == 0.25
        assert bool(share > 0.2)
        assert not torch.allclose(ids, ids + 1)
        assert torch.multinomial(torch.tensor([[0.0, 1.0, 0.0]]), 1).tolist() == [[1]]
        for made in (torch.zeros(3, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool), torch.full((2,), 7)):
            assert not isinstance(made, FakeTensor)
        assert torch.full((2,), 7).tolist() == [7, 7]
        assert torch.tensor([1.5]).tolist() == [1.5]
        assert isinstance(torch.zeros(3), FakeTensor)  # a buffer that fake values would be written to
    assert not isinstance(torch.zeros(3), FakeTensor)
