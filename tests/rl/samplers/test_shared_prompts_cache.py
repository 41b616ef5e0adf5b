"""Completions sampled with prompts cached once equal those with prompts cached for each row."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from perl.measure.ledger import Timeline
from perl.measure.probe import listening
from perl.rl.samplers import kv_cache
from perl.rl.samplers.base import Samples, Sampling
from perl.rl.samplers.decode_attention import attend, tolerance
from perl.rl.samplers.local import LocalSampler
from perl.rl.samplers.shared_prompts_cache import SharedPromptsCache, SharedPromptsLayer
from perl.roles.role import Role
from tests.backbones.test_shared_prompts import gpt2, qwen3, roles_on
from tests.tiny import random_llama

COPIES = [3, 1, 4, 2]


def drawn(lm: Any, shares: bool, end_ids: tuple[int, ...] = tuple(range(2, 50, 6))) -> tuple[Samples, Timeline]:
    """Draw ten completions of four prompts, most of which end early; return them and the memory used."""
    roles = roles_on(lm)
    roles.shares_prompts = shares
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(32, 50, (length,), generator=generator).tolist() for length in (9, 20, 3, 17)]
    asked = [prompt for prompt, copies in zip(prompts, COPIES, strict=True) for _ in range(copies)]
    sampling = Sampling(max_new_tokens=24, temperature=1.5, end_ids=end_ids, pad_id=0, prompts_at_once=3)
    timeline = Timeline({})
    with timeline, listening(timeline):
        timeline.phase("generate")
        samples = LocalSampler(roles).draw(Role.POLICY, asked, sampling, torch.Generator().manual_seed(0))
    return samples, timeline


@pytest.mark.parametrize("made", [partial(random_llama, vocab_size=50), gpt2, qwen3])
def test_what_is_drawn_is_what_a_cache_of_rows_draws(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are removed one by one, and a prompt with its last row."""
    monkeypatch.setattr(kv_cache, "STEP", 8)  # the part of the rows grows twice
    prompts_left, attends = [], SharedPromptsLayer.attend

    def watched(self: SharedPromptsLayer, *args: Any) -> Tensor:
        prompts_left.append((len(self.prompts[0]), len(args[0])))
        return attends(self, *args)

    monkeypatch.setattr(SharedPromptsLayer, "attend", watched)
    shared, _ = drawn(made(), shares=True)
    assert prompts_left[0] == (4, 10)
    assert prompts_left[-1][0] < 4
    used = len(prompts_left)
    plain, _ = drawn(made(), shares=False)
    assert len(prompts_left) == used
    assert len(set(shared.completion_lengths)) > 4
    assert torch.equal(shared.ids_BL, plain.ids_BL)
    torch.testing.assert_close(shared.sampler_log_probs_BT, plain.sampler_log_probs_BT, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [[2, 2], [1, 3]])
def test_attention_is_that_over_prompts_and_rows_joined(copies: list[int], dtype: torch.dtype) -> None:
    lm = qwen3().to(dtype)  # four heads, two of keys
    cache = SharedPromptsCache(lm, copies, 16, 5)
    (layer, *_), generator = cache.layers, torch.Generator().manual_seed(0)

    def states(rows: int, heads: int, length: int) -> Tensor:
        return torch.randn(rows, heads, length, 16, generator=generator).to(dtype)

    with cache.prefilling(slice(0, 4)):
        layer.update(states(2, 2, 16), states(2, 2, 16))
    cache.prefilled()
    assert layer.get_seq_length() == 16
    query, added = states(4, 4, 1), torch.zeros(4, 1, 21, dtype=dtype)
    added[2, :, :9] = torch.finfo(dtype).min
    key, value = layer.update(states(4, 2, 1), states(4, 2, 1))
    assert cache.layer_of(key) is layer
    assert layer.get_mask_sizes(1) == (21, 0)
    added_XL1 = added.expand(4, 2, 21).reshape(8, 21, 1)
    expected = attend(query, *layer.joined(key, value), added_XL1, 0.3)
    found = layer.attend(query, key, value, added_XL1, 0.3)
    assert (found - expected).norm() <= tolerance(dtype) * expected.norm()
    assert (found - attend(query, *layer.joined(key, value), None, 0.3)).norm() > 0.1


def test_prompts_take_their_memory_once_and_give_it_back() -> None:
    """The cache has ten rows of 24 positions and four prompts of 20, padded to 32, not ten rows of 56."""
    gc.disable()
    try:
        found = [drawn(random_llama(), shares, ()) for shares in (True, False)]
        timelines = [timeline for _, timeline in found]
        assert timelines[0].current == timelines[1].current
    finally:
        gc.enable()
    kept = [timeline.memory()["generate"].kinds["kv_cache"] for timeline in timelines]
    assert kept[0] / kept[1] == (10 * 24 + 4 * 32) / (10 * 56)
