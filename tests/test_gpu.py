"""On a GPU the host does not wait for every token, and every tensor is on the right device."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perl.predict import TRY, Trial, trial_session
from perl.recipe import Recipe, StageName, load_recipe
from perl.rl.collector import read_completions
from perl.rl.loop import collect
from perl.rl.samplers.base import Samples, Sampling
from perl.rl.samplers.local import LocalSampler
from perl.rl.update import Learner
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.conftest import WriteRecipe
from tests.pretend_gpu import OnGpu, Waits, pretend_gpu
from tests.tiny import lora, random_llama

TOKENS = 32
ENDS = tuple(range(3, 12))


def policy(device: str) -> SharedBase:
    roles = SharedBase(lora(random_llama(num_hidden_layers=1).to(device), targets="attention")).eval()
    roles.add(Role.POLICY)
    return roles


def drawn(roles: SharedBase) -> Samples:
    sampling = Sampling(TOKENS, 1.0, ENDS, pad_id=0, prompts_at_once=4)
    generator = torch.Generator(roles.device).manual_seed(0)
    return LocalSampler(roles).draw(Role.POLICY, [[5, 6, 7], [8] * 20, [9, 10]] * 3, sampling, generator)


def test_sampling_waits_once_in_sixteen_tokens_and_draws_the_same() -> None:
    expected = drawn(policy("cpu"))
    with pretend_gpu() as waits:
        roles = policy("cuda")
        waits.clear()
        found = drawn(roles)
    assert waits.total() == TOKENS // 16, waits
    assert found.completion_lengths == expected.completion_lengths
    assert len(set(found.completion_lengths)) > 3  # they end at various tokens, most of them between two checks
    assert min(found.completion_lengths) < 16 < max(found.completion_lengths)
    for name in ("ids_BL", "mask_BL", "ended_B", "sampler_log_probs_BT"):
        one = getattr(found, name)
        assert isinstance(one, OnGpu), name
        torch.testing.assert_close(one.held, getattr(expected, name))


def tried(write_recipe: WriteRecipe, mixed_data: Path, **rl: Any) -> Any:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    trained = {"epochs": 1, "batch_size": 4, "learning_rate": 0.003}
    settings = {"prompts_per_step": 4, "micro_batch_size": 2, "max_new_tokens": 4, "reward": {}, **rl}
    return load_recipe(write_recipe(data=data, sft=trained, reward={**trained}, rl=settings))


def watched(update: Callable[..., Any], waits: Waits, found: list[int]) -> Callable[..., Any]:
    """Wrap an update to record how often the host waits in it."""

    def watching(*arguments: Any) -> Any:
        before = waits.total()
        result = update(*arguments)
        found.append(waits.total() - before)
        return result

    return watching


@pytest.mark.parametrize(
    "rl",
    [
        {"algorithm": "ppo", "epochs": 1},
        pytest.param({"algorithm": "ppo", "epochs": 1, "critic": "adapter"}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "rloo", "epochs": 1, "samples_per_prompt": 2}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "dapo", "epochs": 1, "samples_per_prompt": 2}, marks=pytest.mark.slow),
    ],
    ids=["ppo", "ppo-critic", "rloo", "dapo"],
)
def test_a_step_of_rl_waits_a_few_times_and_an_update_three_at_most(
    rl: dict[str, Any], write_recipe: WriteRecipe, mixed_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reward model, two or more micro-batches have as many waits as one."""
    updates: list[int] = []
    recipe, trial = tried(write_recipe, mixed_data, **rl), Trial(1, measured=False)

    def collect_first(*arguments: Any) -> Any:
        waits.clear()  # of the setup
        return collect(*arguments)

    with pretend_gpu() as waits, trial_session(recipe, trial) as session:
        monkeypatch.setattr("perl.predict.rl.collect", collect_first)
        monkeypatch.setattr(Learner, "update", watched(Learner.update, waits, updates))
        TRY["rl"](session)
        assert session.device.type == session.roles.device.type == "cuda"
    assert len(updates) == 1
    assert updates[0] <= 3, waits
    assert waits.total() <= 12, waits


def learned(recipe: Recipe, stage: StageName) -> dict[str, torch.Tensor]:
    """Return the weights after two steps of a stage."""
    with trial_session(recipe, Trial(2)) as session:
        TRY[stage](session)
        of = {"sft": Role.SFT, "reward": Role.REWARD, "rl": Role.POLICY}[stage]
        return {name: weight.detach().cpu().clone() for name, weight in session.roles.weights(of).items()}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_every_stage_computes_on_the_gpu_what_it_does_on_the_cpu(
    stage: StageName, tuning: str, write_recipe: WriteRecipe, mixed_data: Path
) -> None:
    recipe = tried(write_recipe, mixed_data, max_new_tokens=2).model_copy(update={"tuning": tuning})
    on_cpu = learned(recipe, stage)
    with pretend_gpu():
        on_gpu = learned(recipe, stage)
    assert on_gpu.keys() == on_cpu.keys()
    assert on_gpu
    for name, weight in on_cpu.items():
        assert on_gpu[name].dtype == weight.dtype
        torch.testing.assert_close(on_gpu[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_cuda_counts_no_more_waits_in_sampling() -> None:
    roles = policy("cuda")
    drawn(roles)  # the first loads kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn(roles)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchronizing" in str(one.message)]
    assert len(waits) <= TOKENS // 16, [f"{one.filename}:{one.lineno}" for one in waits]


@pytest.mark.gpu
def test_what_is_drawn_on_a_gpu_has_the_log_probs_of_a_pass() -> None:
    roles = policy("cuda")
    samples = drawn(roles)
    log_probs_BT, _ = read_completions(roles, Role.POLICY, samples, 4, temperature=1.0, head=None)
    torch.testing.assert_close(log_probs_BT, samples.sampler_log_probs_BT, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_learns_on_a_gpu(
    stage: StageName, dtype: str, write_recipe: WriteRecipe, mixed_data: Path
) -> None:
    if stage == "sft":
        pytest.importorskip("trl")
    recipe = tried(write_recipe, mixed_data)
    weights = learned(recipe.model_copy(update={"base": recipe.base.model_copy(update={"dtype": dtype})}), stage)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name)  # they begin at 0
