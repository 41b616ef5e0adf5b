"""ULMFiT's full tuning: learning rates by step and layer as in the paper, and gradual unfreezing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from perl.backbones.loading import load_base
from perl.commands.compare import variant
from perl.errors import UserError
from perl.recipe import Recipe, load_recipe
from perl.roles.role import Role
from perl.roles.separate_models import SeparateModels
from perl.stages.identity import stage_settings
from perl.stages.pipeline import run
from perl.stages.reward import RewardTrainer
from perl.stages.ulmfit import layers_of, slanted_triangular
from tests.conftest import WriteRecipe
from tests.encoder_decoders import tiny_bart
from tests.encoders import tiny_bert
from tests.exported import recipe_on
from tests.stopping import stopped_after

RATE = 0.01
ULMFIT = {"layer_decay": 2.6, "schedule": "slanted_triangular", "gradual_unfreezing": True}


def test_the_schedule_is_the_papers() -> None:
    """T = 100: the cut is at 10; halfway up, and halfway down at 55, p is 1/2."""
    expected = {0: 1 / 32, 5: 16.5 / 32, 10: 1.0, 55: 16.5 / 32, 100: 1 / 32}
    assert {step: slanted_triangular(step, 100) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 9, 19, 200])
def test_no_rate_is_below_a_32nd_however_few_steps_there_are(steps: int) -> None:
    shares = [slanted_triangular(step, steps) for step in range(steps)]
    assert min(shares) == pytest.approx(1 / 32)
    assert max(shares) <= 1


@pytest.mark.parametrize(
    ("maker", "top", "bottom", "count"),
    [
        ("llama", {"model.norm", "lm_head", "score"}, {"model.embed_tokens"}, 4),
        ("gpt2", {"transformer.ln_f", "score.weight"}, {"transformer.wte", "transformer.wpe"}, 4),
        ("bert", {"classifier", "bert.pooler"}, {"bert.embeddings"}, 4),
        ("bart", {"score.weight"}, {"model.shared", "embed_positions", "layernorm_embedding"}, 6),
    ],
)
def test_layers_are_the_head_the_blocks_from_the_top_and_the_embeddings(
    maker: str,
    top: set[str],
    bottom: set[str],
    count: int,
    tiny_llama: Path,
    tiny_gpt2: Path,
    tmp_path: Path,
) -> None:
    made = {"llama": lambda: tiny_llama, "gpt2": lambda: tiny_gpt2}
    others = {"bert": tiny_bert, "bart": tiny_bart}
    folder = made[maker]() if maker in made else others[maker](tmp_path)
    base, lm = load_base(str(folder), torch.float32, torch.device("cpu"), generates=maker != "bert")
    roles = SeparateModels(lm, base.load)
    roles.add(Role.REWARD, head=True)
    names = {
        id(weight): name for name, weight in (roles.weights(Role.REWARD) | roles.head_weights(Role.REWARD)).items()
    }
    layers = [[names[id(weight)] for weight in layer] for layer in layers_of(roles, Role.REWARD)]
    assert sorted(name for layer in layers for name in layer) == sorted(names.values())
    assert len(layers) == count
    assert all(any(part in name for part in top) for name in layers[0])
    assert all(any(part in name for part in bottom) for name in layers[-1])
    assert all(".1." in name for name in layers[1])  # of two blocks the upper one
    if maker == "bart":
        assert all("decoder" in name for layer in layers[1:3] for name in layer)


def sft(base: Path, data: Path, out: Path, full: dict[str, Any], **settings: Any) -> dict[str, torch.Tensor]:
    """Run SFT with full tuning; return the largest change of each weight."""
    settings = {
        "batch_size": 8,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_length": 64,
    } | settings
    run(recipe_on(base, data, tuning="full", full=full, sft=settings, reward=None, rl=None), out)
    trained, before = (
        load_file(out / "sft" / "model" / "model.safetensors"),
        AutoModelForCausalLM.from_pretrained(base),
    )
    own = dict(before.named_parameters())
    return {name: (weight - own[name]).detach().abs().max() for name, weight in trained.items()}


def of_layers(moved: dict[str, torch.Tensor]) -> list[float]:
    """Return the largest weight change per layer, from the top; embeddings are untied."""
    layers = (("model.norm", "lm_head"), ("layers.1",), ("layers.0",), ("embed_tokens",))
    return [max(float(moved[name]) for name in moved if any(part in name for part in layer)) for layer in layers]


def test_each_layer_learns_at_a_lower_rate_than_the_one_above_it(
    tiny_llama: Path, small_data: Path, tmp_path: Path
) -> None:
    """AdamW's first step moves every weight with a gradient by its learning rate."""
    data = small_data / "demonstrations.jsonl"
    moved = sft(tiny_llama, data, tmp_path / "run", {"layer_decay": 2.6}, epochs=1)
    assert of_layers(moved) == pytest.approx([RATE / 2.6**depth for depth in range(4)], rel=1e-3)
    line = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["learning_rate"] == pytest.approx(RATE)


@pytest.mark.parametrize("epochs", [pytest.param(1, marks=pytest.mark.slow), 2, 4])
def test_a_layer_is_frozen_until_its_epoch(
    epochs: int, tiny_llama: Path, small_data: Path, tmp_path: Path
) -> None:
    data = small_data / "demonstrations.jsonl"
    moved = sft(tiny_llama, data, tmp_path / "run", {"gradual_unfreezing": True}, epochs=epochs, batch_size=4)
    assert [distance > 0 for distance in of_layers(moved)] == [depth < epochs for depth in range(4)]


def test_the_rates_of_a_stage_are_the_schedules(tiny_llama: Path, small_data: Path, tmp_path: Path) -> None:
    full, data = {"schedule": "slanted_triangular"}, small_data / "demonstrations.jsonl"
    sft(tiny_llama, data, tmp_path / "run", full, epochs=10, batch_size=4, lr_scheduler_type="cosine")
    lines = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["learning_rate"] for line in lines]
    assert len(found) == 20
    assert found == pytest.approx([RATE * slanted_triangular(step, 20) for step in range(20)])


def test_a_classifier_learns_so_and_goes_on_from_a_checkpoint_to_the_same_bytes(
    mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_bert(tmp_path / "base")
    reward = {"epochs": 5, "batch_size": 4, "learning_rate": 0.02, "max_length": 64}
    settings = {"tuning": "full", "full": ULMFIT, "reward": reward, "sft": None, "rl": None, "checkpoint_every": 3}
    recipe = recipe_on(base, mixed_data, **settings)
    run(recipe, tmp_path / "whole")
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["stages"]["reward"]["eval"]["auroc"] == 1.0
    with stopped_after(RewardTrainer, 11, monkeypatch):
        run(recipe, tmp_path / "stopped")
    run(recipe, tmp_path / "stopped")
    place = "reward/model/model.safetensors"
    assert (tmp_path / "stopped" / place).read_bytes() == (tmp_path / "whole" / place).read_bytes()


def test_it_is_read_under_full_tuning_alone(tiny_llama: Path, mixed_data: Path) -> None:
    def made(**changes: Any) -> Recipe:
        return recipe_on(tiny_llama, mixed_data, **changes)

    recipe = made(full=ULMFIT)
    assert not recipe.full_tuning.gradual_unfreezing
    assert variant(recipe, "full", 0).full_tuning.layer_decay == 2.6
    assert stage_settings(recipe, "sft") == stage_settings(made(), "sft")
    whole, plain = made(full=ULMFIT, tuning="full"), made(tuning="full")
    assert stage_settings(whole, "reward") != stage_settings(plain, "reward")
    assert stage_settings(whole, "rl") == stage_settings(plain, "rl")


@pytest.mark.parametrize(
    ("full", "message"),
    [
        ({"layer_decay": 0.5}, r"full\.layer_decay"),
        ({"schedule": "triangular"}, r"full\.schedule"),
        ({"unfreeze": True}, r"full\.unfreeze"),
    ],
)
def test_impossible_values_are_refused(full: dict[str, Any], message: str, write_recipe: WriteRecipe) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write_recipe(full=full))
