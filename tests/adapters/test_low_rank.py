"""A LoRA layer computes the same as peft's on every path, and cached factors are up to date."""

import copy

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from perl.adapters.low_rank import _LinearLowRank, compute_with_one_adapter, kept_factors
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora, random_llama

INPUTS, OUTPUTS = 8, 12


class Net(nn.Module):
    """One layer, for peft to put an adapter on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def adapted(kind: str, dtype: torch.dtype) -> tuple[LoraLayer, LoraLayer]:
    """Return a layer with an adapter, once as peft computes it and once as PERL does."""
    from peft import LoraConfig
    from peft.functional import inject_adapter_in_model

    torch.manual_seed(0)
    layers = {
        "linear": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
        "biased": lambda: nn.Linear(INPUTS, OUTPUTS),
        "conv": lambda: Conv1D(OUTPUTS, INPUTS),
    }
    net = Net(layers[kind]().to(dtype)).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], fan_in_fan_out=kind == "conv")
    inject_adapter_in_model(config, net, adapter_name="policy")
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    peft_layer = net.layer
    ours = copy.deepcopy(peft_layer)
    compute_with_one_adapter(ours)
    return peft_layer, ours


def results(layer: LoraLayer, x: Tensor, learns: bool) -> list[Tensor]:
    factors = [layer.lora_A["policy"].weight, layer.lora_B["policy"].weight]
    for factor in factors:
        factor.requires_grad_(learns)
    y = layer(x)
    return [
        y,
        *torch.autograd.grad(
            (y.float() * torch.linspace(0, 1, OUTPUTS)).sum(), [x, *factors][: 3 if learns else 1]
        ),
    ]


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", ["linear", "biased", "conv"])
def test_results_and_gradients_are_those_of_peft(kind: str, learns: bool) -> None:
    theirs, ours = adapted(kind, torch.float32)
    x = torch.randn(2, 5, INPUTS, requires_grad=True)
    actual, expected = results(ours, x, learns), results(theirs, x, learns)
    assert len(actual) == (4 if learns else 2)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert isinstance(actual[0].grad_fn, _LinearLowRank._backward_cls) == (kind != "conv")


def test_a_watched_layer_is_called() -> None:
    """Hooks on the layer (to gather its weight, to count operations) are called."""
    theirs, ours = adapted("linear", torch.float32)
    calls = []
    ours.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, INPUTS, requires_grad=True)
    for got, want in zip(results(ours, x, True), results(theirs, x, True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert calls == [1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_factors_change_no_bit(dtype: torch.dtype) -> None:
    _, ours = adapted("linear", dtype)
    x = torch.randn(2, 5, INPUTS, dtype=dtype)
    expected = ours(x)
    with kept_factors([ours], "policy", dtype):
        assert torch.equal(ours(x), expected)


def test_kept_factors_end_with_the_sampling_and_are_one_roles_only() -> None:
    lm = random_llama(torch.bfloat16)
    roles = SharedBase(lora(lm, 4, 8, dropout=0.1))
    roles.add(Role.SFT)
    roles.add(Role.POLICY)
    roles.eval()
    ids_BL = torch.arange(3, 15).view(2, 6)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)

    def read(role: Role) -> Tensor:
        with torch.no_grad(), roles.role(role):
            return roles.trunk(ids_BL, mask_BL)

    def learn(role: Role, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in roles.parameters_of(role):
            parameter.data.normal_(std=0.2, generator=generator)

    learn(Role.SFT, 0)
    learn(Role.POLICY, 0)
    with roles.sampling(Role.POLICY):
        inside = read(Role.POLICY)
        assert torch.equal(read(Role.SFT), inside)  # the same weights so far
        learn(Role.SFT, 1)
        assert not torch.equal(read(Role.SFT), inside)  # the other role's are read unchanged
        assert torch.equal(read(Role.POLICY), inside)
    learn(Role.POLICY, 1)
    assert not torch.equal(read(Role.POLICY), inside)
    assert roles.active is Role.BASE
    with roles.train().sampling(Role.POLICY):  # dropout is active, so results differ
        assert not torch.equal(read(Role.POLICY), read(Role.POLICY))
