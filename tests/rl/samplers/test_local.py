"""The sampler's log-probs equal those of a teacher-forced forward pass."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from perl.backbones import Decoder
from perl.backbones.loading import load_base
from perl.rl.batches import micro_batches, trim
from perl.rl.collector import read_completions
from perl.rl.samplers import local as sampler
from perl.rl.samplers.base import Samples, Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase
from tests.tiny import lora


def rollout(folder: Path, seed: int = 0, layers: str = "all") -> tuple[Roles, Samples, int]:
    _, lm = load_base(str(folder), torch.float32, torch.device("cpu"))
    roles = SharedBase(lora(lm, 4, 8, layers=layers)).eval()
    roles.add(Role.POLICY)
    roles.add(Role.CRITIC, weights=False, head=True)
    torch.manual_seed(1)
    for parameter in roles.parameters_of(Role.POLICY, Role.CRITIC):
        parameter.data.normal_(std=0.3)
    prompts = [torch.randint(3, 250, (length,)).tolist() for length in (3, 20, 9, 14, 1)]
    # A fairly likely token ends completions here, so that some end early and some are truncated.
    logits = roles.lm(torch.tensor([prompts[1]])).logits[0, -1]
    end_id = int(logits.argmax())
    samples = LocalSampler(roles).draw(
        Role.POLICY,
        prompts * 8,
        Sampling(max_new_tokens=40, temperature=0.7, end_ids=(end_id,), pad_id=0, prompts_at_once=2),
        torch.Generator().manual_seed(seed),
        read=lambda hidden_BD: roles.head(Role.CRITIC)(hidden_BD.float()),
    )
    return roles, samples, end_id


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_sampled_log_probs_and_values_equal_teacher_forced_ones(
    model: str, request: pytest.FixtureRequest
) -> None:
    roles, samples, _ = rollout(request.getfixturevalue(model))
    log_probs_BT, values_BT = read_completions(roles, Role.POLICY, samples, 7, temperature=0.7, head=Role.CRITIC)
    mask_BT = samples.completion_mask_BT
    torch.testing.assert_close(log_probs_BT[mask_BT], samples.sampler_log_probs_BT[mask_BT], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values_BT[mask_BT], samples.read_BT[mask_BT], rtol=1e-4, atol=1e-4)
    assert log_probs_BT[mask_BT].abs().max() > 0.1
    assert samples.sampler_log_probs_BT[~mask_BT].eq(0).all()


def test_states_below_the_adapters_are_kept_while_sampling(tiny_llama: Path) -> None:
    """They equal a pass over the samples for every token, including the last ones, which rewards are read from."""
    roles, samples, _ = rollout(tiny_llama, layers="top-half")
    assert roles.shared_blocks == 1
    assert 0 < samples.ended_B.sum() < len(samples.ended_B)
    expected = roles.lower_hidden(samples.ids_BL, samples.mask_BL)[samples.mask_BL]
    torch.testing.assert_close(samples.lower_hidden_BLD[samples.mask_BL], expected, rtol=1e-4, atol=1e-5)
    on_top, _ = read_completions(roles, Role.POLICY, samples, 7, temperature=0.7, head=None)
    whole, _ = read_completions(
        roles, Role.POLICY, replace(samples, lower_hidden_BLD=None), 7, temperature=0.7, head=None
    )
    torch.testing.assert_close(on_top, whole, rtol=1e-4, atol=1e-5)


def test_answers_end_with_the_end_token_or_are_cut(tiny_llama: Path) -> None:
    _, samples, end_id = rollout(tiny_llama)
    assert samples.ended_B.any()
    assert not samples.ended_B.all()
    for ids, ended in zip(samples.completions(), samples.ended_B, strict=True):
        assert end_id not in ids[:-1]
        assert (ids[-1] == end_id) == bool(ended)
        assert ended or len(ids) == 40


def test_answers_end_at_any_of_several_tokens(tiny_llama: Path) -> None:
    """The first end token ends the completion, whichever it is; nothing after it belongs to it."""
    _, lm = load_base(str(tiny_llama), torch.float32, torch.device("cpu"))
    roles = SharedBase(lora(lm, 4, 8)).eval()
    ends = (3, *range(20, 60))
    sampling = Sampling(max_new_tokens=40, temperature=1.0, end_ids=ends, pad_id=0, prompts_at_once=64)
    samples = LocalSampler(roles).draw(Role.BASE, [[5, 6, 7]] * 64, sampling, torch.Generator().manual_seed(0))
    last = [ids[-1] for ids in samples.completions()]
    assert len(set(last)) > 10
    for ids, ended in zip(samples.completions(), samples.ended_B.tolist(), strict=True):
        assert not set(ids[:-1]) & set(ends)
        assert (ids[-1] in ends) == ended
        assert ended or len(ids) == 40


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """100,000 draws are within four standard deviations; impossible tokens, even first or last, are not drawn."""
    shares = torch.tensor([[0.0, 0.1, 0.0, 0.6, 0.3, 0.0], [0.5, 0.0, 0.0, 0.0, 0.0, 0.5]])
    count = 100_000
    uniform = torch.rand(2 * count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sampler.draw(shares.repeat(count, 1), uniform).view(count, 2)
    for column, expected in enumerate(shares):
        found = torch.bincount(drawn[:, column], minlength=6) / count
        assert found[expected == 0].eq(0).all()
        assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_the_same_seed_draws_the_same_answers(tiny_llama: Path) -> None:
    first, again, other = (rollout(tiny_llama, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.ids_BL, again.ids_BL)
    assert torch.equal(first.sampler_log_probs_BT, again.sampler_log_probs_BT)
    assert not torch.equal(first.ids_BL, other.ids_BL)


def test_micro_batches_hold_each_row_once_and_lose_no_token(tiny_llama: Path) -> None:
    _, samples, _ = rollout(tiny_llama)
    seen = []
    for rows in micro_batches(samples, 7):
        seen += rows
        batch = trim(samples, rows)
        assert batch.mask_BL.sum() == samples.mask_BL[rows].sum()
        assert torch.equal(batch.ids_BL[batch.mask_BL], samples.ids_BL[rows][samples.mask_BL[rows]])
        assert batch.completion_mask_BT.sum() == samples.completion_mask_BT[rows].sum()
        assert batch.read_BT.shape == batch.sampler_log_probs_BT.shape == batch.completion_mask_BT.shape
    assert sorted(seen) == list(range(40))


def test_the_same_prompt_is_computed_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts with eight completions each, two prompts at once, take three prefills of five rows in total."""
    widths = []
    real = Decoder.extend

    def watched(self: Decoder, lm: Any, ids_BN: torch.Tensor, *more: Any) -> torch.Tensor:
        widths.append(tuple(ids_BN.shape))
        return real(self, lm, ids_BN, *more)

    monkeypatch.setattr(Decoder, "extend", watched)
    rollout(tiny_llama)
    prefills = [shape for shape in widths if shape[1] > 1]
    assert prefills == [(2, 16), (2, 16), (1, 32)]
    # Rows are removed once a quarter of the batch has ended, and do not return.
    batches = [shape[0] for shape in widths if shape[1] == 1]
    assert batches[0] == 40
    assert batches == sorted(batches, reverse=True)
    assert all(after <= 0.75 * before for before, after in pairwise(batches) if after != before)
