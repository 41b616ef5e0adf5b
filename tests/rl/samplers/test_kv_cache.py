"""The cache written in place equals transformers' own, and is not moved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from perl.backbones.padding import BUCKET
from perl.measure.ledger import Timeline
from perl.measure.probe import listening
from perl.private.transformers import cache_argument
from perl.rl.samplers import kv_cache
from perl.rl.samplers import local as sampler
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.kv_cache import KVCache
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora

PROMPT, CAPACITY = 6, 12


@pytest.fixture(params=[("tiny_llama", 5), ("tiny_llama", None), ("tiny_gpt2", 5), ("tiny_gpt2", None)])
def lm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Return a model whose caches grow in steps of 5 positions, or show only filled positions."""
    name, step = request.param
    folder: Path = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if step is None:
        model._can_compile_fullgraph = False
    else:
        monkeypatch.setattr(kv_cache, "STEP", step)
    with torch.no_grad():
        for parameter in model.parameters():  # with the initial weights, attention hardly matters
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Return four prompts padded on the left, and the tokens that follow them."""
    ids_BL = torch.randint(3, 250, (4, CAPACITY), generator=torch.Generator().manual_seed(1))
    mask_BL = torch.ones(4, CAPACITY, dtype=torch.long)
    mask_BL[1, :3] = mask_BL[3, :5] = 0
    return ids_BL, mask_BL


def room(lm: PreTrainedModel, capacity: int = CAPACITY, batch: int = 4) -> KVCache:
    return KVCache(lm, batch, 0, capacity)


@torch.no_grad()
def stepwise(lm: PreTrainedModel, cache: Cache, keeps: dict[int, list[int]] | None = None) -> list[Tensor]:
    """Return hidden states of the prompt and each further token; `keeps` has the rows kept from a position on."""
    ids_BL, mask_BL = batch()
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    start, found = 0, []
    for end in range(PROMPT, CAPACITY + 1):
        if keeps and end - 1 in keeps:
            rows = torch.tensor(keeps[end - 1])
            ids_BL, mask_BL, positions_BL = ids_BL[rows], mask_BL[rows], positions_BL[rows]
            if isinstance(cache, KVCache):
                cache.keep(rows)
            else:
                cache.batch_select_indices(rows)
        hidden = lm.base_model(
            input_ids=ids_BL[:, start:end],
            attention_mask=mask_BL[:, :end],
            position_ids=positions_BL[:, start:end],
            use_cache=True,
            **{cache_argument(type(lm).forward): cache},
        ).last_hidden_state
        found.append(hidden[mask_BL[:, start:end].bool()])
        start = end
    return found


@pytest.mark.parametrize("keeps", [{}, {7: [0, 2, 3], 9: [2], 11: [0]}, {8: [1, 3]}])
def test_hidden_states_are_those_of_the_dynamic_cache(lm: PreTrainedModel, keeps: dict[int, list[int]]) -> None:
    expected = stepwise(lm, DynamicCache(config=lm.config), keeps)
    actual = stepwise(lm, room(lm), keeps)
    assert len(actual) == CAPACITY - PROMPT + 1
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_it_is_no_matter_how_much_more_the_cache_could_hold(lm: PreTrainedModel) -> None:
    roomy, tight = stepwise(lm, room(lm, 5 * CAPACITY)), stepwise(lm, room(lm))
    for got, want in zip(roomy, tight, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_rows_that_go_on_keep_what_they_wrote(lm: PreTrainedModel) -> None:
    """They equal a computation without the rows that ended."""
    together = stepwise(lm, room(lm), {8: [3]})
    ids_BL, mask_BL = (tensor[3:] for tensor in batch())
    with torch.no_grad():
        alone = lm.base_model(
            input_ids=ids_BL, attention_mask=mask_BL, position_ids=(mask_BL.cumsum(1) - 1).clamp(min=0)
        ).last_hidden_state
    torch.testing.assert_close(together[-1], alone[0, -1:], rtol=1e-4, atol=1e-5)


def places(cache: KVCache) -> list[int]:
    return [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def states(rows: int, positions: int) -> Tensor:
    return torch.arange(rows * 2 * positions * 4, dtype=torch.float32).view(rows, 2, positions, 4)


def seen(lm: PreTrainedModel, filled: int) -> int:
    """Return the positions visible to attention."""
    return min(CAPACITY, -(-filled // 5) * 5) if lm._can_compile_fullgraph else filled


def test_memory_is_reserved_once(lm: PreTrainedModel) -> None:
    cache = room(lm)
    for layer in range(len(cache.layers)):
        cache.update(states(4, PROMPT), states(4, PROMPT), layer)
    before = places(cache)
    storages = [layer.keys.untyped_storage().nbytes() for layer in cache.layers]
    assert storages == [4 * 2 * CAPACITY * 4 * 4] * len(cache.layers)
    cache.keep(torch.tensor([1, 3]))
    for layer in range(len(cache.layers)):
        keys, values = cache.update(-states(2, 1), -states(2, 1) - 1, layer)
        assert keys.shape == values.shape == (2, 2, seen(lm, PROMPT + 1), 4)
        assert torch.equal(keys[:, :, :PROMPT], states(4, PROMPT)[[1, 3]])
        assert torch.equal(keys[:, :, PROMPT : PROMPT + 1], -states(2, 1))
        assert torch.equal(values[:, :, PROMPT : PROMPT + 1], -states(2, 1) - 1)
        assert keys[:, :, PROMPT + 1 :].eq(0).all()
    assert places(cache) == before
    assert cache.get_seq_length() == PROMPT + 1


def test_what_is_seen_is_dense_where_it_grows_in_steps(lm: PreTrainedModel) -> None:
    cache = room(lm)
    for end in range(1, CAPACITY + 1):
        keys, values = cache.update(states(4, 1) + end, -states(4, 1) - end, 0)
        assert keys.shape[2] == values.shape[2] == seen(lm, end)
        if lm._can_compile_fullgraph:
            assert keys.is_contiguous()
            assert values.is_contiguous()
        for position in range(end):
            assert torch.equal(keys[:, :, position], states(4, 1)[:, :, 0] + position + 1)
            assert torch.equal(values[:, :, position], -keys[:, :, position])


def test_its_bytes_are_made_once_and_known_as_the_cache(lm: PreTrainedModel) -> None:
    stepwise(lm, room(lm))  # what transformers makes once
    timeline = Timeline({})
    with timeline, listening(timeline):
        timeline.phase("generate")
        cache = room(lm)
        stepwise(lm, cache)
    layers, width = lm.config.num_hidden_layers, lm.config.hidden_size
    assert timeline.memory()["generate"].kinds["kv_cache"] == layers * 2 * 4 * CAPACITY * width * 4
    assert timeline.current >= sum(2 * layer.keys.nbytes for layer in cache.layers)


def test_more_than_its_capacity_is_refused(lm: PreTrainedModel) -> None:
    cache = room(lm, PROMPT, batch=1)
    cache.update(states(1, PROMPT), states(1, PROMPT), 0)
    with pytest.raises(RuntimeError):
        cache.update(states(1, 2), states(1, 2), 0)


def test_sampling_fills_what_it_reserved_but_for_the_last_token(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[KVCache] = []

    def watched(*args: Any) -> KVCache:
        made.append(KVCache(*args))
        return made[-1]

    monkeypatch.setattr(sampler, "KVCache", watched)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    roles = SharedBase(lora(model, 2, 4))
    sampling = Sampling(max_new_tokens=5, temperature=1.0, end_ids=(), pad_id=0, prompts_at_once=1)
    sampler.LocalSampler(roles).draw(Role.BASE, [[3, 4, 5], [6]], sampling, torch.Generator().manual_seed(0))
    for layer in made[0].layers:
        assert layer.keys.shape == (2, 4, BUCKET + 5, 8)
        assert layer.filled == BUCKET + 5 - 1  # nothing is computed after the last token drawn


def test_skipped_positions_are_taken_for_filled(lm: PreTrainedModel) -> None:
    cache = room(lm, batch=2)
    for layer in range(len(cache.layers)):
        cache.update(states(2, PROMPT), states(2, PROMPT), layer)
    cache.skip(2)
    assert cache.get_seq_length() == PROMPT + 2
    keys, _ = cache.update(-states(2, 1), -states(2, 1), 0)
    assert torch.equal(keys[:, :, :PROMPT], states(2, PROMPT))
    assert torch.equal(keys[:, :, PROMPT + 2 : PROMPT + 3], -states(2, 1))


@torch.no_grad()
def test_prompts_written_a_few_at_a_time_are_those_written_at_once(lm: PreTrainedModel) -> None:
    """Prompts are trimmed to their own columns and equal ones computed once; then one further token follows."""
    ids_BL, mask_BL = batch()
    ids_BL[2], mask_BL[2] = ids_BL[3], mask_BL[3]
    whole, parts = KVCache(lm, 4, PROMPT, 1), KVCache(lm, 4, PROMPT, 1)
    prefill(lm, whole, slice(0, 4), ids_BL[:, :PROMPT], mask_BL[:, :PROMPT])
    prefill(lm, parts, slice(0, 2), ids_BL[:2, :PROMPT], mask_BL[:2, :PROMPT])
    prefill(lm, parts, slice(2, 4), ids_BL[3:, 5:PROMPT], mask_BL[3:, 5:PROMPT], torch.tensor([0, 0]))
    hidden = []
    for cache in (whole, parts):
        cache.prefilled()
        hidden.append(
            lm.base_model(
                input_ids=ids_BL[:, PROMPT : PROMPT + 1],
                attention_mask=mask_BL[:, : PROMPT + 1],
                position_ids=(mask_BL.cumsum(1) - 1)[:, PROMPT : PROMPT + 1],
                use_cache=True,
                **{cache_argument(type(lm).forward): cache},
            ).last_hidden_state
        )
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(other.keys[2, :, 5:PROMPT], other.keys[3, :, 5:PROMPT], rtol=0, atol=0)
        torch.testing.assert_close(other.values[:2], one.values[:2], rtol=1e-5, atol=1e-5)


def prefill(
    lm: PreTrainedModel, cache: KVCache, rows: slice, ids: Tensor, mask: Tensor, sources: Tensor | None = None
) -> None:
    with cache.prefilling(rows, sources):
        lm.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            **{cache_argument(type(lm).forward): cache},
        )
