"""Packed weights: equal products, equal bytes afterwards and no more memory in between."""

import pytest
import torch
from torch import Tensor, nn

from perl.backbones.base import weights_sha256
from perl.measure.flops import Flops
from perl.measure.ledger import Timeline
from perl.measure.probe import listening
from perl.private.torch import PACKS_BF16
from perl.rl.collector import read_completions
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.packed import packed
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora, random_llama

pytestmark = pytest.mark.skipif(not PACKS_BF16, reason="no oneDNN, or no products in bf16")


def layers(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 200), nn.SiLU(), nn.Linear(200, 96, bias=False)).to(dtype)


@torch.no_grad()
def test_products_are_the_same() -> None:
    model, x = layers(), torch.randn(3, 5, 96, dtype=torch.bfloat16)
    plain = model(x)
    with packed(model):
        assert [part.weight.numel() for part in (model[0], model[2])] == [0, 0]  # it is another path
        torch.testing.assert_close(model(x), plain)
        torch.testing.assert_close(model(x[:, -1]), plain[:, -1])  # a view
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_the_same_bytes_afterwards(fails: bool) -> None:
    model = layers()
    before, parameters = weights_sha256(model), list(model.parameters())
    with pytest.raises(KeyboardInterrupt) if fails else torch.no_grad(), packed(model):
        assert weights_sha256(model) != before
        if fails:
            raise KeyboardInterrupt
    assert weights_sha256(model) == before
    assert all(ours is theirs for ours, theirs in zip(parameters, model.parameters(), strict=True))
    model(torch.randn(2, 96, dtype=torch.bfloat16)).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)


def test_an_interrupt_while_packing_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    before, pack, seen = weights_sha256(model), torch.ops.mkldnn._reorder_linear_weight, []

    def second_fails(weight: Tensor) -> Tensor:
        seen.append(weight)
        if len(seen) == 2:
            raise MemoryError
        result: Tensor = pack(weight)
        return result

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", second_fails)
    with pytest.raises(MemoryError), packed(model):
        pass
    assert len(seen) == 2
    assert weights_sha256(model) == before


def test_takes_the_place_of_the_plain_weights_in_memory() -> None:
    model = layers()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with Timeline({"base_weights": model.parameters()}) as live, listening(live), packed(model):
        live.phase("generate")
        torch.zeros(1)
    both = size + model[0].weight.nbytes  # the plain weight and the packed one, of one layer at a time
    memory = live.memory()
    assert live.current == size
    assert memory["load"].peak == both
    assert memory["generate"].kinds["base_weights"] == both


@torch.no_grad()
def test_operations_count_as_those_of_plain_weights() -> None:
    model, x = layers(), torch.randn(7, 96, dtype=torch.bfloat16)
    counts = []
    for scope in (torch.no_grad(), packed(model)):
        flops = Flops([])
        with scope, flops:
            model(x)
        counts.append(flops.total)
    assert counts[0] == counts[1] == 2 * 7 * 2 * 96 * 200


def test_leaves_alone_what_it_cannot_pack() -> None:
    tied, hooked, single = layers(), layers(), layers(torch.float32)
    tied[2].weight = nn.Parameter(tied[0].weight.detach().T.contiguous())
    embedding = nn.Embedding(200, 96, dtype=torch.bfloat16)
    embedding.weight = tied[0].weight
    hooked[0].register_forward_hook(lambda *_: None)
    for model, left in ((nn.ModuleList([tied, embedding]), tied[0]), (hooked, hooked[0]), (single, single[0])):
        with packed(model):
            assert left.weight.numel() == 96 * 200


@pytest.mark.parametrize("layers", ["all", "top-half"])
def test_an_answer_has_the_log_probs_that_a_plain_forward_gives_it(layers: str) -> None:
    lm = random_llama(torch.bfloat16, hidden_size=64, initializer_range=0.05)
    roles = SharedBase(lora(lm, 4, 8, layers=layers)).eval()
    roles.add(Role.POLICY)
    for parameter in roles.parameters_of(Role.POLICY):
        parameter.data.normal_(std=0.05)
    before, sampling = roles.base_sha256(), Sampling(32, 1.0, (), 0, 4)
    generator = torch.Generator().manual_seed(0)
    samples = LocalSampler(roles).draw(Role.POLICY, [[3, 5, 8], [9, 4]] * 4, sampling, generator)
    plain, _ = read_completions(roles, Role.POLICY, samples, 4, temperature=1.0, head=None)
    torch.testing.assert_close(plain, samples.sampler_log_probs_BT, rtol=0, atol=0.02)  # bf16 has 8 bits
    assert plain.std() > 0.05  # some are more likely than others
    assert roles.base_sha256() == before
