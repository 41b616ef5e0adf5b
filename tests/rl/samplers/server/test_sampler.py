"""Sampling by a server: requests and responses; every fault is reported in the next draw."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perl.rl.collector import read_completions
from perl.rl.samplers import SamplerSettings
from perl.rl.samplers.base import Samples, Sampling, Share
from perl.rl.samplers.local import LocalSampler
from perl.rl.samplers.server.client import ServerError
from perl.rl.samplers.server.parallel import Calls
from perl.rl.samplers.server.sampler import ServerSampler
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.fake_vllm import FakeVllm
from tests.tiny import lora, random_llama

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]] * 2
SAMPLING = Sampling(max_new_tokens=8, temperature=0.7, end_ids=(*range(20, 50),), pad_id=0, prompts_at_once=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        random_llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def fake(model: Path) -> Iterator[FakeVllm]:
    fake = FakeVllm(model)
    with fake.serving():
        yield fake


def roles_on(model: Path) -> SharedBase:
    """Return a policy and a reference that are not in their initial state."""
    roles = SharedBase(lora(random_llama(num_hidden_layers=1), 4, 8)).eval()
    for role in (Role.SFT, Role.POLICY):
        roles.add(role)
        move(roles, 0.2, role)
    return roles


def move(roles: SharedBase, size: float, role: Role = Role.POLICY) -> None:
    """Update the policy by adding noise to every weight."""
    generator = torch.Generator().manual_seed(1)
    for weight in roles.weights(role).values():
        weight.data += size * torch.randn(weight.shape, generator=generator)


def sampler_of(roles: SharedBase, folder: Path, *fakes: FakeVllm, **settings: Any) -> ServerSampler:
    urls = tuple(fake.url for fake in fakes)
    return ServerSampler(roles, SamplerSettings(urls, str(folder), **{"patience": 0.0, **settings}))


def draw(sampler: ServerSampler | LocalSampler, role: Role = Role.POLICY, **changes: Any) -> Samples:
    seed = changes.pop("seed", 0)
    return sampler.draw(role, PROMPTS, SAMPLING, torch.Generator().manual_seed(seed), **changes)


@pytest.mark.parametrize("role", [Role.BASE, Role.SFT, Role.POLICY])
def test_what_a_server_draws_is_of_the_role(role: Role, model: Path, fake: FakeVllm, tmp_path: Path) -> None:
    """Log-probs of peft on the server equal those of a local forward pass; completions end where they should."""
    roles = roles_on(model)
    samples = draw(sampler_of(roles, tmp_path, fake), role)
    own_BT, _ = read_completions(roles, role, samples, 8, temperature=0.7, head=None)
    torch.testing.assert_close(samples.sampler_log_probs_BT, own_BT, rtol=0, atol=1e-4)
    assert samples.prompt_ids() == PROMPTS
    assert 0 < samples.ended_B.sum() < len(PROMPTS)
    for ids, ended in zip(samples.completions(), samples.ended_B.tolist(), strict=True):
        assert ended == (ids[-1] in SAMPLING.end_ids)
        assert ended or len(ids) == 8
    assert samples.versions is not None
    assert {one["model"] for one in fake.asked} == set(samples.versions)
    assert samples.versions[0].startswith("base" if role is Role.BASE else f"{role}-")


def test_each_completion_has_a_seed_of_its_own_that_follows_from_the_runs(
    model: Path, fake: FakeVllm, tmp_path: Path
) -> None:
    """It does not depend on the order of the server's responses or on the processes' shares of the rows."""
    sampler = sampler_of(roles_on(model), tmp_path, fake)
    first, again, other = draw(sampler), draw(sampler), draw(sampler, seed=1)
    assert torch.equal(first.ids_BL, again.ids_BL)
    assert not torch.equal(first.ids_BL, other.ids_BL)
    assert len({one["seed"] for one in fake.asked}) == 2 * len(PROMPTS)
    share = sampler.draw(
        Role.POLICY, PROMPTS[4:], SAMPLING, torch.Generator().manual_seed(0), Share([*range(4, 8)], 8)
    )
    assert share.completions() == first.completions()[4:]


def test_tokens_are_as_likely_as_those_of_the_local_sampler(model: Path, fake: FakeVllm, tmp_path: Path) -> None:
    roles = roles_on(model)
    means = [
        torch.cat([draw(sampler, seed=seed).sampler_log_probs_BT.sum(1) for seed in range(8)])
        for sampler in (LocalSampler(roles), sampler_of(roles, tmp_path, fake))
    ]
    error = (means[0].var() / len(means[0]) + means[1].var() / len(means[1])).sqrt()
    assert abs(means[0].mean() - means[1].mean()) < 3 * error
    assert means[0].std() == pytest.approx(float(means[1].std()), rel=0.25)


def test_versions_are_new_folders_and_go_two_updates_later(model: Path, fake: FakeVllm, tmp_path: Path) -> None:
    roles = roles_on(model)
    sampler, names = sampler_of(roles, tmp_path, fake), []
    draw(sampler, Role.SFT)
    for _ in range(4):
        names += draw(sampler).versions[:1]  # type: ignore[index]
        move(roles, 0.05)
        sampler.sync(Role.POLICY)
    assert len(set(names)) == 4
    sft = [name for name in fake.loaded if name.startswith("sft")]
    assert [*fake.loaded] == [*sft, *names[2:]]
    assert fake.unloaded == names[:2]
    assert {path.name for path in tmp_path.iterdir()} == {*sft, *names[1:]}  # the second was unloaded just now
    # A resumed run finds and removes the versions left by its earlier process.
    again = sampler_of(roles, tmp_path, fake)
    newest = draw(again).versions[0]  # type: ignore[index]
    assert [*fake.loaded] == [*sft, newest]


def test_a_draw_that_was_begun_keeps_its_version_on_the_server(
    model: Path, fake: FakeVllm, tmp_path: Path
) -> None:
    """This holds however many versions follow, and the draw is compared with the weights at its start."""
    roles = roles_on(model)
    sampler = sampler_of(roles, tmp_path, fake, staleness=1)
    expected = draw(sampler)
    sampler.begin(Role.POLICY, PROMPTS, SAMPLING, torch.Generator().manual_seed(0))
    for seed in range(1, 5):
        move(roles, 0.05)
        sampler.sync(Role.POLICY)
        draw(sampler, seed=seed)
    assert expected.versions is not None
    assert expected.versions[0] in fake.loaded
    begun = draw(sampler)
    assert torch.equal(begun.ids_BL, expected.ids_BL)
    assert begun.versions == expected.versions
    move(roles, 0.05)
    sampler.sync(Role.POLICY)
    draw(sampler)
    assert expected.versions[0] not in fake.loaded


def test_replicas_draw_in_turn_and_each_has_the_adapter(model: Path, fake: FakeVllm, tmp_path: Path) -> None:
    roles, other = roles_on(model), FakeVllm(model)
    with other.serving():
        alone = draw(sampler_of(roles, tmp_path / "one", fake))
        fake.asked.clear()
        both = sampler_of(roles, tmp_path / "two", fake, other)
        assert torch.equal(draw(both).ids_BL, alone.ids_BL)
        assert len(fake.asked) == len(other.asked) == len(PROMPTS) // 2
        move(roles, 0.05)
        both.sync(Role.POLICY)
        other.fault = "stale"
        with pytest.raises(ServerError, match=f"the completions of {other.url} as policy-"):
            draw(both)


FAULTS = {
    "base served": ("are not from these weights", "it serves the base without the adapter"),
    "stale": ("are not from these weights", "it is stale: it serves policy-"),
    "stale cache": ("are not from these weights", "part of it is stale"),
    "wrong scale": ("are not from these weights", "another scale or rank"),
    "raw log-probs": ("are not from these weights", "--logprobs-mode processed_logprobs"),
    "logits": ("log-probs above 0", "--logprobs-mode processed_logprobs"),
    "loads nothing": ("but lists no such adapter", "name every replica"),
    "dropped": ("the adapter was dropped", "--max-loras"),
    "slow": ("is slow: /v1/completions took longer than 1 s", "time_limit"),
    "half answers": ("sent an incomplete response from /v1/completions", "Look at its log"),
    "no log-probs": ("sent an incomplete response from /v1/completions", "Look at its log"),
    "cut answers": ("a completion was cut after 1 of 8 tokens", "Look at its log"),
    "refuses": ("refuses a prompt of", "--max-model-len"),
    "fails": ("has failed: status 500", "Look at its log"),
    "wants a key": ("requires its API key: status 401", "Set VLLM_API_KEY"),
    "another server": ("sent an unusable response from /v1/models: status 404", "Look at its log"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_the_draw_after_the_update_where_it_begins(
    fault: str, model: Path, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.rl.samplers.server.client.PAUSE", 0.001)
    if fault == "slow":
        monkeypatch.setattr("perl.rl.samplers.server.client.TRIES", 1)
    roles = roles_on(model)
    sampler = sampler_of(roles, tmp_path, fake, time_limit=1.0 if fault == "slow" else 5.0)
    draw(sampler)
    move(roles, 0.02)
    sampler.sync(Role.POLICY)
    fake.fault = fault
    with pytest.raises(ServerError) as caught:
        draw(sampler)
    for words in FAULTS[fault]:
        assert words in str(caught.value)
    assert caught.value.status == 1


def test_a_version_that_is_one_small_update_old_is_told_from_the_newest(
    model: Path, fake: FakeVllm, tmp_path: Path
) -> None:
    """Its log-probs differ by less than the limit; updates too small to distinguish are accumulated."""
    roles = roles_on(model)
    sampler = sampler_of(roles, tmp_path, fake)
    draw(sampler)
    move(roles, 1e-5)
    sampler.sync(Role.POLICY)
    draw(sampler)
    fake.fault = "stale"
    move(roles, 2e-5)
    sampler.sync(Role.POLICY)
    with pytest.raises(ServerError, match=r"its log-probs miss \d+% of the policy's movement since policy-"):
        draw(sampler)


def test_a_server_that_was_started_anew_gets_its_adapter_again(model: Path, tmp_path: Path) -> None:
    """The restart happens between draws or during one; a run that waits for the server says so."""
    fake, roles = FakeVllm(model), roles_on(model)
    with fake.serving():
        sampler = sampler_of(roles, tmp_path, fake, patience=20.0)
        before = draw(sampler)
        fake.restart()
        assert torch.equal(draw(sampler).ids_BL, before.ids_BL)
    fake.restart()
    results: list[Samples] = []
    waiting = threading.Thread(target=lambda: results.append(draw(sampler)))
    waiting.start()
    time.sleep(0.3)
    with fake.serving():
        waiting.join()
    assert torch.equal(results[0].ids_BL, before.ids_BL)


def test_a_server_that_stays_away_is_given_up(model: Path, tmp_path: Path) -> None:
    fake = FakeVllm(model)
    with fake.serving():
        sampler = sampler_of(roles_on(model), tmp_path, fake)
    with pytest.raises(ServerError, match="does not answer") as caught:
        draw(sampler)
    assert fake.url in str(caught.value)
    assert "perl-rlhf sampler RECIPE" in str(caught.value)


def test_calls_side_by_side_keep_their_order_and_stop_at_the_first_that_fails() -> None:
    assert Calls(lambda one: 2 * one, range(100), 8).results() == [*range(0, 200, 2)]
    assert Calls(str, [], 8).results() == []
    begun = []

    def fails(one: int) -> None:
        begun.append(one)
        raise ServerError(f"number {one}")

    with pytest.raises(ServerError, match="number 0"):
        Calls(fails, range(100), 1).results()
    assert len(begun) == 1
