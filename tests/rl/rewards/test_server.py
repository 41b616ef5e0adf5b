"""A reward model on servers: requests, responses, and the error for each fault."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perl.backbones.tokens import Tokens
from perl.data.records import Prompt
from perl.rl.rewards.base import RewardServers
from perl.rl.rewards.model import score_rows
from perl.rl.rewards.server import ServedModel
from perl.rl.samplers.base import Samples
from perl.rl.samplers.server.client import ServerError
from perl.roles.export_formats import save_adapter
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.stages.opening import open_run
from perl.stages.rl_reward_server import check_reward_servers
from tests.conftest import RunCli, WriteRecipe
from tests.fake_reward_server import FakeRewardServer
from tests.tiny import lora, random_llama

ENDS = (7, 8)


class Served:
    """A reward model in memory, and the folder from which a server loads it."""

    def __init__(self, folder: Path) -> None:
        with torch.random.fork_rng():
            random_llama(num_hidden_layers=1).save_pretrained(folder / "base")
            self.roles = SharedBase(lora(random_llama(num_hidden_layers=1), 4, 8)).eval()
            self.roles.add(Role.REWARD, head=True)
            for parameter in self.roles.parameters_of(Role.REWARD):
                parameter.data += 0.3 * torch.randn(parameter.shape)
        (folder / "adapter").mkdir()
        save_adapter(self.roles, Role.REWARD, Role.REWARD, "base", folder / "adapter")
        self.fake = FakeRewardServer(folder / "base", folder / "adapter")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    with served.fake.serving():
        yield served


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl.rl.samplers.server.client.PAUSE", 0.001)


def source_of(*urls: str, **changes: Any) -> ServedModel:
    asked: dict[str, Any] = {"model": "reward", "probability": False, "time_limit": 5.0, "patience": 0.0}
    asked |= {"in_flight": 4, "mismatch_limit": None}
    return ServedModel(RewardServers(urls, **asked | changes), 1e-3, ENDS, None)


def samples(count: int = 40) -> Samples:
    """Return completions of two tokens after prompts of one to three; every other one ends with an end token."""
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(20, 300, (count, 5), generator=generator)
    ids_BL[::2, -1] = ENDS[1]
    lengths = [1 + row % 3 for row in range(count)]
    mask_BL = torch.arange(5) >= 3 - torch.tensor(lengths)[:, None]
    return Samples(ids_BL, mask_BL, lengths, [2] * count, torch.arange(count) % 2 == 0, torch.zeros(count, 2))


def rewards(source: ServedModel, drawn: Samples) -> list[float]:
    return source([Prompt((), "")] * len(drawn.ids_BL), drawn, [""] * len(drawn.ids_BL))


def test_scores_are_those_here_by_row_and_read_at_the_written_end(served: Served) -> None:
    """There are two replicas, each of which scores a part in requests of a few rows."""
    other = FakeRewardServer(served.fake._folder, served.fake._adapter)
    served.fake.asked.clear()
    with other.serving():
        source, drawn = source_of(served.fake.url, other.url), samples()
        got = rewards(source, drawn)
    both = zip(drawn.prompt_ids(), drawn.completions(), strict=True)
    rows = [Tokens.joined(one, [*two[:-1], ENDS[0]] if two[-1] == ENDS[1] else two) for one, two in both]
    expected = score_rows(served.roles, [Role.REWARD], rows, pad_id=0)[0]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1
    asked = [row for body in (*served.fake.asked, *other.asked) for row in body["input"]]
    assert sorted(asked) == sorted(
        row.ids for row in (*rows, rows[0], rows[0], rows[0])
    )  # one compared again: at the start, and for each
    assert other.asked
    assert source.weights_sha256 is not None
    probable = rewards(source_of(served.fake.url, probability=True), drawn)
    torch.testing.assert_close(torch.tensor(probable, dtype=torch.float64), expected.sigmoid(), rtol=0, atol=1e-4)


FAULTS = {
    "two classes": ("sends 2 numbers per row", "num_labels"),
    "few scores": ("0 scores of 1 rows", "Look at its log"),
    "not a number": ("a score is not a finite number", "Look at its log"),
    "one token more": ("it read 4 tokens of rows of 3", "Look at its log"),
    "no classifier": ("does not score: status 404", "--runner pooling"),
    "refuses": ("refuses 1 rows of up to 3 tokens: status 400", "--max-model-len"),
    "half answers": ("sent an incomplete response from /classify", "Look at its log"),
    "fails": ("has failed: status 500", "Look at its log"),
    "wants a key": ("requires its API key", "VLLM_API_KEY"),
    "another server": ("sent an unusable response from /v1/models", "Look at its log"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_none_is_named(fault: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.fake, "fault", fault)
    with pytest.raises(ServerError) as caught:
        rewards(source_of(served.fake.url), samples())
    for words in FAULTS[fault]:
        assert words in str(caught.value)
    assert caught.value.status == 1


def test_a_server_that_is_slow_or_away_is_named(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl.rl.samplers.server.client.TRIES", 1)
    with (
        served.fake._lock,
        pytest.raises(ServerError, match="is slow: /classify took longer") as caught,
    ):
        rewards(source_of(served.fake.url, time_limit=0.1), samples())
    assert "Raise rl.reward.time_limit" in str(caught.value)
    with pytest.raises(ServerError, match="does not answer"):
        rewards(source_of("http://127.0.0.1:9"), samples())
    with pytest.raises(ServerError, match="has no model critic: it has base, reward"):
        rewards(source_of(served.fake.url, model="critic"), samples())


def test_another_adapter_in_the_middle_of_a_run_is_seen(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(served.fake.url)
    rewards(source, samples())
    monkeypatch.setattr(served.fake, "fault", "base served")
    with pytest.raises(ServerError, match="it now serves another adapter or another base"):
        rewards(source, samples())


RL = {"algorithm": "rloo", "samples_per_prompt": 2, "steps": 2, "prompts_per_step": 2, "max_new_tokens": 4}
RL |= {"eval_prompts": 2, "eval_samples": 2, "learning_rate": 0.01, "micro_batch_size": 4, "critic": "none"}
REWARD = {"loss": "thumbs", "epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 0.05}
"""Settings under which the trained adapter changes scores by more than rounding."""


NAMED = {
    "it serves the base without the adapter": "base served",
    "it sends the sigmoid of the score": "sigmoid",
    "all its scores are equal": "softmax",
    "another dtype, LoRA scale or rank": "wrong scale",
    "a different adapter or head": "another head",
    "the server tokenizes a prompt differently": "other tokens",
}


def write(write_recipe: WriteRecipe, reward: Any) -> Path:
    return write_recipe(reward=REWARD, rl={**RL, "reward": reward})


def test_a_server_that_scores_otherwise_than_the_reward_model_is_named(
    tiny_llama: Path,
    write_recipe: WriteRecipe,
    run_cli: RunCli,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    recipe = write(write_recipe, {"kind": "server", "url": "http://127.0.0.1:9", "patience": 0.0})
    assert run_cli("reward", recipe, "--out", out)[0] == 0
    assert run_cli("export", out, "reward", adapter)[0] == 0
    fake = FakeRewardServer(tiny_llama, adapter)
    with fake.serving():
        file = out / "recipe.yaml"
        file.write_text(file.read_text().replace("http://127.0.0.1:9", fake.url))
        session = open_run(str(out))
        check_reward_servers(session)
        assert "✓ scores of" in "".join(capsys.readouterr())
        for words, fault in NAMED.items():
            fake.fault = fault
            with pytest.raises(ServerError) as caught:
                check_reward_servers(session)
            assert words in str(caught.value), fault


@pytest.mark.slow
def test_rl_with_a_server_is_rl_with_the_model_that_it_serves(
    tiny_llama: Path, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    """Rewards are equal, another port does not make another run, and it says that nothing is compared."""
    local, out = tmp_path / "local", tmp_path / "out"
    assert run_cli("run", write(write_recipe, {"kind": "model"}), "--out", local)[0] == 0
    assert run_cli("export", local, "reward", tmp_path / "adapter")[0] == 0
    fake = FakeRewardServer(tiny_llama, tmp_path / "adapter")
    with fake.serving():
        server = {"kind": "server", "url": fake.url, "patience": 0.0}
        status, said = run_cli("run", write(write_recipe, [server]), "--from", local, "--out", out)
        assert status == 0, said
        moved = {**server, "url": f"{fake.url}/", "patience": 1.0}
        status, said = run_cli("run", write(write_recipe, [moved]), "--out", out)
        assert status == 0, said
        alone = write_recipe(reward=None, rl={**RL, "steps": 1, "reward": {**moved, "probability": True}})
        status, said = run_cli("run", alone, "--out", tmp_path / "alone")
        assert status == 0, said
        assert said.count("cannot be checked") == 1
    ours, theirs = (
        [json.loads(line) for line in (run / "policy" / "metrics.jsonl").read_text().splitlines()]
        for run in (local, out)
    )
    assert [one["reward"] for one in theirs] == pytest.approx([one["reward"] for one in ours], abs=1e-4)
    assert len({one["server_weights"] for one in theirs}) == 1


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"url": "localhost:8001"}, "is not an address of a server"),
        ({"url": []}, "a server needs a url"),
        ({}, "url"),
        ({"url": "http://a:1", "probability": True}, "leave probability out"),
    ],
)
def test_half_a_server_in_a_recipe_is_refused(
    reward: dict[str, Any], words: str, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    recipe = write_recipe(rl={**RL, "reward": {"kind": "server", **reward}})
    status, said = run_cli("run", recipe, "--out", tmp_path / "out")
    assert status == 2
    assert words in said.lower()
