"""Whole runs whose completions are sampled by a server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import perl.rl.loop
from perl.commands.compare import variant
from perl.recipe import load_recipe
from tests.conftest import RunCli, WriteRecipe
from tests.fake_vllm import FakeVllm

RL: dict[str, Any] = {
    "algorithm": "rloo",
    "reward": {"function": "rewards.py:length"},
    "steps": 3,
    "prompts_per_step": 2,
    "samples_per_prompt": 2,
    "micro_batch_size": 4,
    "max_new_tokens": 4,
    "eval_prompts": 2,
    "eval_samples": 2,
    "missing_end_penalty": 0.0,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
}


@pytest.fixture
def fake(tiny_llama: Path) -> Iterator[FakeVllm]:
    fake = FakeVllm(tiny_llama, max_model_len=256)
    with fake.serving():
        yield fake


def write(write_recipe: WriteRecipe, fake: FakeVllm, folder: Path, **rl: Any) -> Path:
    sampler = {"url": fake.url, "adapter_dir": str(folder / "adapters"), "patience": 0.0}
    return write_recipe(reward=None, rl={**RL, "sampler": sampler, **rl})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "policy" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_which_weights_drew_each_rollout(
    fake: FakeVllm, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write(write_recipe, fake, tmp_path), tmp_path / "out"
    status, said = run_cli("run", recipe, "--out", out)
    assert status == 0, said
    steps = lines(out)
    versions = [step["adapter"] for step in steps]
    assert len(set(versions)) == 3
    assert all(step["sampler_mismatch"] < 1e-5 for step in steps)
    drew = [one["model"] for one in fake.asked]
    assert all(drew.count(version) >= 4 for version in versions)
    assert (out / "report.html").exists()
    asked = len(fake.asked)
    monkeypatch.setattr("perl.stages.two_runs.MIN_DIALOGUES", 3)
    for command in (["evaluate", out, "policy"], ["compare-runs", out, out]):
        status, said = run_cli(*command)
        assert status == 0, said
    assert len(fake.asked) == asked  # the server may have stopped by then
    assert variant(load_recipe(recipe), "full", 0).rl.sampler.kind == "local"


def test_a_fault_in_the_middle_ends_the_run_before_the_next_update_and_it_goes_on_from_there(
    fake: FakeVllm, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated draws give the same completions, so the run ends like an uninterrupted one."""
    recipe = write(write_recipe, fake, tmp_path)
    status, said = run_cli("run", recipe, "checkpoint_every=1", "--out", tmp_path / "whole")
    assert status == 0, said
    update, out = perl.rl.loop.update, tmp_path / "out"

    def breaks(loop: Any, step: int, *rest: Any) -> dict[str, float]:
        metrics = update(loop, step, *rest)
        fake.fault = "base served" if step == 1 else ""
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(perl.rl.loop, "update", breaks)
        status, said = run_cli("run", recipe, "checkpoint_every=1", "--out", out)
    assert status == 1
    assert "it serves the base without the adapter" in said
    assert "Traceback" not in said
    assert len(lines(out)) == 2
    fake.fault = ""
    fake.restart()
    status, said = run_cli("run", recipe, "checkpoint_every=1", "--out", out)
    assert status == 0, said
    assert [step["reward"] for step in lines(out)] == [step["reward"] for step in lines(tmp_path / "whole")]
    same = ["policy/adapter/adapter_model.safetensors"]
    assert [(out / file).read_bytes() for file in same] == [
        (tmp_path / "whole" / file).read_bytes() for file in same
    ]


def test_a_server_draws_ahead_while_the_policy_learns(
    fake: FakeVllm, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two rollouts use the same weights; each later one uses those from the start of the step before."""
    update, asked = perl.rl.loop.update, []

    def slowly(*arguments: Any) -> dict[str, float]:
        time.sleep(0.5)
        asked.append(len(fake.asked))
        return update(*arguments)

    monkeypatch.setattr(perl.rl.loop, "update", slowly)
    recipe, out = write(write_recipe, fake, tmp_path), tmp_path / "out"
    status, said = run_cli("run", recipe, "rl.sampler.staleness=1", "--out", out)
    assert status == 0, said
    first, second, third = (step["adapter"] for step in lines(out))
    assert first == second != third
    mismatch = [step["sampler_mismatch"] for step in lines(out)]
    assert mismatch[0] < 1e-5 < min(mismatch[1:])
    # Both rollouts of the first weights were requested before the first update.
    assert first not in {one["model"] for one in fake.asked[asked[0] :]}
    assert [one["model"] for one in fake.asked[: asked[0]]].count(first) >= 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": {"url": "localhost:8000", "adapter_dir": "a"}}, "http://127.0.0.1:8000"),
        ({"sampler": {"url": "http://a:99999", "adapter_dir": "a"}}, "'http://a:99999' is not an address"),
        ({"sampler": {"url": "http://a:1/v1/", "adapter_dir": "a"}}, "ends in /v1"),
        ({"sampler": {"url": "http://a:1"}}, "Set url, such as to http://127.0.0.1:8000, and adapter_dir"),
        ({"sampler": {"kind": "local", "url": "http://a:1", "adapter_dir": "a"}}, "Set kind to server"),
        ({"sampler": {"kind": "server"}}, "a server needs a url"),
        ({"sampler": {"staleness": 1}}, "only a server samples while the policy is trained"),
    ],
)
def test_half_a_server_in_a_recipe_is_refused(
    changes: dict[str, Any], words: str, fake: FakeVllm, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    status, said = run_cli("run", write(write_recipe, fake, tmp_path, **changes), "--out", tmp_path / "out")
    assert status == 2
    assert words in said
    assert not fake.asked


@pytest.mark.parametrize(
    ("key", "words"), [("tuning=full", "Set tuning: lora"), ("adapter.kind=dora", "Use kind lora or rslora")]
)
def test_what_servers_do_not_take_is_refused(
    key: str, words: str, fake: FakeVllm, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    recipe = write(write_recipe, fake, tmp_path)
    recipe.write_text(recipe.read_text().replace("lora:\n  alpha: 4\n  rank: 2\n", "adapter: {kind: lora}\n"))
    status, said = run_cli("run", recipe, key, "--out", tmp_path / "out")
    assert status == 2
    assert words in said
