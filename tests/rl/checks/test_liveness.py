"""Checks around the first updates: updates below rounding or without effect; faults that only training shows."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from perl.recipe import load_recipe
from perl.rl.checks.movement import below_rounding, policy_movement
from perl.rl.checks.perturbation import perturbed
from perl.rl.checks.tracking import gap, rounding_noise
from perl.rl.collector import Collector
from perl.rl.rollout import Rollout
from perl.rl.samplers.base import Samples
from perl.roles.fingerprint import changed, fingerprint
from perl.roles.role import Role
from perl.stages.opening import open_session
from perl.stages.rl_setup import setup_collector, tokenized_prompts
from tests.conftest import RunCli, WriteRecipe

RL: dict[str, Any] = {
    "reward": {"function": "rewards.py:length"},
    "steps": 12,
    "prompts_per_step": 4,
    "max_new_tokens": 16,
    "eval_prompts": 2,
    "missing_end_penalty": 0.0,
}


@pytest.fixture
def write_recipe(write_recipe: WriteRecipe, tiny_llama: Path, tmp_path: Path) -> WriteRecipe:
    """Return a writer of recipes on a base whose log-probs differ as a trained base's do."""
    folder = shutil.copytree(tiny_llama, tmp_path / "loud")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama, initializer_range=0.2)).save_pretrained(folder)
    return partial(write_recipe, reward=None, base={"model": str(folder), "dtype": "float32"}, rl=RL)


def opened(recipe: Path, *overrides: str) -> tuple[Collector, Samples]:
    """Return the collector of a session with a policy, and completions that it drew."""
    session = open_session(load_recipe(recipe, list(overrides)), recipe.parent / "out")
    session.roles.add(Role.POLICY)
    collector, prompts = setup_collector(session), tokenized_prompts(session, session.train.prompts[:4])
    return collector, collector.draw(Role.POLICY, prompts, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learning_rate_at_which_nothing_can_be_learned_ends_the_run_and_is_named(
    dtype: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe()
    overrides = (f"base.dtype={dtype}", "rl.learning_rate=1.0e-12")
    code, text = run_cli("run", recipe, *overrides, "--out", tmp_path / "out")
    assert code == 0, text
    (incident,) = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["rl"]["incidents"]
    assert (incident["name"], incident["action"], incident["step"]) == ("nothing_learned", "stopped", 1)
    assert 0 < incident["value"] < 1e-8
    assert 1e-4 < float(incident["remedy"].removeprefix("Set rl.learning_rate: ").removesuffix(".")) <= 1e-2
    assert "Nothing is learned" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_rollout_that_something_else_than_the_policy_drew_is_seen_at_the_second_step(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples of preflight are correct in this case; only the rollouts are not."""
    collect = Collector.collect

    def stale(self: Collector, role: Role, *arguments: Any, **keywords: Any) -> Rollout:
        return collect(self, Role.BASE if role is Role.POLICY else role, *arguments, **keywords)

    monkeypatch.setattr(Collector, "collect", stale)
    recipe = write_recipe()
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 1, text
    said = " ".join(text.split())
    assert "preflight failed before the second update: share of the policy's first movement that" in said
    assert "the sampler is stale" in said
    monkeypatch.undo()
    assert run_cli("run", recipe, "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_perturbation_leaves_no_trace_though_weights_are_packed_inside(
    tuning: str, write_recipe: WriteRecipe
) -> None:
    collector, samples = opened(write_recipe(tuning=tuning), "base.dtype=bfloat16")
    roles, prompts = collector.roles, samples.prompt_ids()
    everything = dict(roles.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in everything.items()}
    known = fingerprint(everything)
    with perturbed(roles.parameters_of(Role.POLICY), 0.5):
        assert changed(known, everything)
        collector.sampler.draw(Role.POLICY, prompts, collector.sampling, torch.Generator().manual_seed(0))
    assert all(torch.equal(before[name], parameter) for name, parameter in everything.items())
    assert changed(known, everything) == []


def test_movement_is_measured_below_what_bfloat16_rounds_away(write_recipe: WriteRecipe) -> None:
    recipe, found = write_recipe(), {}
    for dtype in ("float32", "bfloat16"):
        collector, _ = opened(recipe, f"base.dtype={dtype}")
        _, samples = opened(recipe)  # the same completions
        generator = torch.Generator().manual_seed(1)
        for name, weight in collector.roles.weights(Role.POLICY).items():
            if "lora_B" in name:
                weight.data.add_(1e-6 * torch.randn(weight.shape, generator=generator))
        found[dtype] = policy_movement(collector, samples)
        if dtype == "bfloat16":
            assert rounding_noise(collector, samples) > 1000 * found[dtype]
    assert 1e-7 < found["float32"] < 1e-4
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.5)


@pytest.mark.parametrize("moved", [0.05, 0.06, 0.08])
@pytest.mark.parametrize("power", [1.0, 3.0, 4.0])
def test_a_small_magnification_that_takes_the_policy_far_is_taken_back(moved: float, power: float) -> None:
    """After about a dozen steps, the policy needs almost no magnification."""
    assert moved / 10 < below_rounding(lambda factor: moved * factor**power) < 10 * moved


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
@pytest.mark.parametrize("reach", [0.002, 0.05])
def test_movement_behind_a_gate_that_saturates_is_read_where_it_is_linear(noise: float, reach: float) -> None:
    assert below_rounding(lambda factor: noise + reach * math.tanh(1e-5 * factor)) == pytest.approx(
        1e-5 * reach, rel=0.8
    )


def test_rounding_noise_is_of_the_size_of_what_sampling_differs_by(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    for dtype, (low, high) in {"float32": (0, 1e-5), "bfloat16": (2e-3, 0.1), "float16": (2e-4, 1e-2)}.items():
        collector, samples = opened(recipe, f"base.dtype={dtype}")
        noise = rounding_noise(collector, samples)
        assert low < noise < high
        read_BT = collector.log_probs(Role.POLICY, samples)
        assert gap(read_BT, samples.sampler_log_probs_BT, samples) < 2 * noise + 1e-6


def test_a_sample_of_a_tensor_shows_dense_changes_in_any_bit() -> None:
    tensors = {"large": torch.zeros(100, 64), "small": torch.zeros(3), "nan": torch.full((2,), torch.nan)}
    before = fingerprint(tensors)
    assert changed(before, tensors) == []
    assert changed(before, tensors | {"small": torch.tensor([0.0, -0.0, 0.0])}) == ["small"]
    assert changed(before, {name: tensors[name] for name in ("small", "nan")}) == ["large"]
    assert changed(before, tensors | {"large": torch.full((100, 64), 1e-30)}) == ["large"]
