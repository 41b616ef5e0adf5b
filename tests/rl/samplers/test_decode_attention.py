"""One token's attention as batched products: equal to the kernel, or the kernel itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perl.rl.samplers import decode_attention
from perl.rl.samplers import local as sampler
from perl.rl.samplers.base import Samples, Sampling
from perl.rl.samplers.decode_attention import attend, fast_decoding, tolerance
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora, random_llama

ROWS, HEADS, LENGTH, SIZE = 3, 4, 70, 16
CPU = torch.device("cpu")


class Attention(torch.nn.Module):
    """The attributes of a layer that transformers' function reads."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // groups


def states(groups: int, dtype: torch.dtype, shift: float = 0.0) -> list[Tensor]:
    """Return query, keys and values."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, HEADS, 1, SIZE, generator=generator)
    key, value = (torch.randn(ROWS, groups, LENGTH, SIZE, generator=generator) for _ in "kv")
    return [(query + shift).to(dtype), (key + shift).to(dtype), value.to(dtype)]


def padding() -> Tensor:
    mask = torch.ones(ROWS, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, ..., :30] = mask[2, ..., :1] = False
    return mask


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_says_what_the_kernel_says(dtype: torch.dtype, groups: int, masked: bool) -> None:
    query, key, value = states(groups, dtype)
    layer, mask = Attention(groups), padding() if masked else None
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    with fast_decoding(CPU):
        attention: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        for _ in range(2):  # the first time both are computed
            actual, _ = attention(layer, query, key, value, mask, scaling=0.3)
            assert actual.shape == expected.shape
            assert (actual - expected).norm() <= tolerance(dtype) * expected.norm()
        assert attention._agrees == {layer: True}
    if masked:
        unmasked, _ = sdpa_attention_forward(layer, query, key, value, None, scaling=0.3)
        assert (unmasked - expected)[1].norm() > 0.1 * expected[1].norm()


def test_by_hand() -> None:
    """Scores ln 3 and 0 give weights of ¾ and ¼; a third key is masked."""
    query = torch.tensor([1.0]).view(1, 1, 1, 1)
    key = torch.tensor([3.0, 1.0, 50.0]).log().view(1, 1, 3, 1)
    value = torch.tensor([4.0, 8.0, 100.0]).view(1, 1, 3, 1)
    added = torch.tensor([0.0, 0.0, torch.finfo(torch.float32).min]).view(1, 3, 1)
    assert float(attend(query, key, value, added, 1.0)) == pytest.approx(5.0)
    # At half the scale √3 to 1.
    assert float(attend(query, key, value, added, 0.5)) == pytest.approx((4 * 3**0.5 + 8) / (3**0.5 + 1))


@torch.no_grad()
def test_a_layer_whose_scores_are_too_large_for_bf16_stays_with_the_kernel() -> None:
    """As with some models' key biases, all scores are near 400, where bf16 has only even numbers."""
    query, key, value = states(HEADS, torch.bfloat16, shift=10.0)
    layer = Attention(HEADS)
    expected, _ = sdpa_attention_forward(layer, query, key, value, None)
    with fast_decoding(CPU):
        attention: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found = [attention(layer, query, key, value, None)[0] for _ in range(2)]
        assert attention._agrees == {layer: False}
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("rest", [{"softcap": 30.0}, {"position_bias": torch.zeros(1, HEADS, 1, LENGTH)}])
def test_other_work_is_the_kernels(rest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    query, key, value = states(HEADS, torch.float32)
    attention = decode_attention._OneToken(lambda *args, **kwargs: asked.append(kwargs) or (query, None))
    with torch.no_grad():
        attention(Attention(HEADS), query, key, value, None, **rest)
    assert asked == [{"scaling": None, **rest}]


@torch.no_grad()
def test_views_of_a_longer_cache_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched products would copy them, and each length would be another shape."""
    monkeypatch.setattr(decode_attention, "attend", lambda *args: pytest.fail("asked"))
    query, key, value = states(HEADS, torch.float32)
    with fast_decoding(CPU):
        attention: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        attention(Attention(HEADS), query, key[:, :, :9], value[:, :, :9], None)


def test_the_kernel_is_back_afterwards() -> None:
    def fail() -> None:
        with fast_decoding(CPU):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with fast_decoding(torch.device("meta")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def drawn(lm: Any) -> Samples:
    roles = SharedBase(lora(lm, 4, 8)).eval()
    roles.add(Role.POLICY)
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of(Role.POLICY):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    prompts = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (3, 20, 9)]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, end_ids=(), pad_id=0, prompts_at_once=2)
    return LocalSampler(roles).draw(Role.POLICY, prompts * 2, sampling, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("groups", [2, 4])
def test_samples_are_those_of_the_kernel(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(decode_attention, "attend", lambda *args: used.append(1) or attend(*args))
    fast = drawn(random_llama(num_key_value_heads=groups))
    assert len(used) == 2 * 11  # layers, and tokens after the first
    monkeypatch.setattr(sampler, "fast_decoding", lambda *_: torch.no_grad())
    plain = drawn(random_llama(num_key_value_heads=groups))
    assert len(used) == 2 * 11
    assert torch.equal(fast.ids_BL, plain.ids_BL)
    torch.testing.assert_close(fast.sampler_log_probs_BT, plain.sampler_log_probs_BT, rtol=1e-4, atol=1e-5)


def test_a_model_with_attention_of_its_own_is_left_alone(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_attention, "attend", lambda *args: pytest.fail("asked"))
    drawn(AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager"))
