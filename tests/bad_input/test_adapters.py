"""Adapters and checkpoints that are damaged or belong to another run are refused, with all differences named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from perl.recipe import STAGES, StageName, load_recipe
from perl.stages.identity import settings_sha256
from perl.stages.pipeline import run
from tests.bad_input.cases import contents
from tests.bad_input.conftest import RefusedIn
from tests.conftest import BRIEF, RunCli

RL = {
    "algorithm": "ppo",
    **BRIEF,
    "critic": "adapter",
    "steps": 2,
    "prompts_per_step": 2,
    "max_new_tokens": 4,
    "eval_prompts": 2,
}


def run_recipe(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    """Run all three stages in a second and return the run folder."""
    recipe = {
        "name": "tiny",
        "checkpoint_every": 1,
        "base": {"model": str(model), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 4},
        "data": {"source": "jsonl", "path": str(data), "held_out": 0.3},
        "sft": {"batch_size": 4, "max_length": 64},
        "reward": {"epochs": 1, "batch_size": 4, "max_length": 64},
        "rl": RL,
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(load_recipe(file), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(tmp_path_factory.mktemp("finished"), tiny_llama, mixed_data)


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_every_adapter_says_what_it_belongs_to(finished: Path, tiny_llama: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml")
    stages: dict[str, StageName] = {"sft": "sft", "reward": "reward", "policy": "rl", "critic": "rl"}
    report = json.loads((finished / "report.json").read_text())
    parents = {"sft": None, "reward": None, "policy": "sft", "critic": "reward"}
    stamps = {role: json.loads((finished / role / "adapter" / "perl.json").read_text()) for role in parents}
    for role, stamp in stamps.items():
        assert stamp["role"] == role
        assert stamp["base"] == str(tiny_llama)
        assert stamp["base_sha256"] == report["base"]["sha256_before"]
        assert (stamp["recipe"], stamp["recipe_sha256"]) == (
            "tiny",
            settings_sha256(recipe, stages[role]),
        )
        parent = parents[role]
        hashed = hashlib.sha256(weights(finished, parent).read_bytes()).hexdigest() if parent else None
        assert (stamp["parent"], stamp["parent_sha256"]) == (parent, hashed)
    for key in ("tokenizer_sha256", "chat_sha256", "end_id"):
        assert len({stamp[key] for stamp in stamps.values()}) == 1


def test_the_hash_of_a_stage_is_of_what_the_recipe_says_of_it(finished: Path, tmp_path: Path) -> None:
    file, shorter = finished / "recipe.yaml", tmp_path / "recipe.yaml"
    shorter.write_text("# a comment\n" + file.read_text().replace("  dropout: 0.0\n", ""))
    assert len(shorter.read_text().splitlines()) == len(file.read_text().splitlines())
    before = {stage: settings_sha256(load_recipe(file), stage) for stage in STAGES}
    assert settings_sha256(load_recipe(shorter), "rl") == before["rl"], "as of a key that a later version adds"
    for override, concerned in (
        ("seed=1", STAGES),
        ("rl.kl_coef=0.06", ("rl",)),
        ("sft.batch_size=2", ("sft",)),
        ("lora.rank=4", STAGES),
        ("name=other", ()),
        ("checkpoint_every=7", ()),
        ("rl.anyway=false", ()),
    ):
        after = {stage: settings_sha256(load_recipe(file, [override]), stage) for stage in STAGES}
        assert {stage for stage in STAGES if after[stage] != before[stage]} == set(concerned), override


def weights(out: Path, role: str) -> Path:
    return out / role / "adapter" / "adapter_model.safetensors"


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file in the reward model's adapter; None removes one."""

    def change(out: Path) -> None:
        path = out / "reward" / "adapter" / file
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def cut(out: Path) -> None:
    file = weights(out, "reward")
    file.write_bytes(file.read_bytes()[:-100])


def pickled(out: Path) -> None:
    weights(out, "reward").unlink()
    torch.save({}, out / "reward" / "adapter" / "adapter_model.bin")


def another_rank(out: Path) -> None:
    tensors = {name: torch.cat([tensor, tensor]) for name, tensor in load_file(weights(out, "reward")).items()}
    save_file(tensors, weights(out, "reward"), {"format": "pt"})


def a_tensor_less(out: Path) -> None:
    tensors = load_file(weights(out, "reward"))
    tensors.pop(min(name for name in tensors if "lora_A" in name))
    save_file(tensors, weights(out, "reward"), {"format": "pt"})


def sft_in_its_place(out: Path) -> None:
    shutil.rmtree(out / "reward" / "adapter")
    shutil.copytree(out / "sft" / "adapter", out / "reward" / "adapter")


ANEW = "Remove {out}/reward/result.json and run the recipe: it continues from its newest checkpoint"
DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (
        lambda out: shutil.rmtree(out / "reward" / "adapter"),
        ("has no perl.json", "reward/adapter", ANEW),
    ),
    "no stamp": (lambda out: (out / "reward" / "adapter" / "perl.json").unlink(), ("has no perl.json", ANEW)),
    "half a stamp": (
        lambda out: (out / "reward" / "adapter" / "perl.json").write_text('{"role": "rew'),
        ("not a stamp", "perl.json", ANEW),
    ),
    "a stamp without a base": (edit("perl.json", base_sha256=None), ("not a stamp", "base_sha256", ANEW)),
    "a stamp of wrong types": (edit("perl.json", reward_mean="x"), ("not a stamp", "reward_mean", ANEW)),
    "a spread of zero": (edit("perl.json", reward_std=0), ("not a stamp", "reward_std", ANEW)),
    "a parent out of the folder": (edit("perl.json", parent="../../x"), ("not a stamp", "parent", ANEW)),
    "no weights": (lambda out: weights(out, "reward").unlink(), ("cannot be read", "safetensors", ANEW)),
    "cut weights": (cut, ("cannot be read", "adapter_model.safetensors", ANEW)),
    "text for weights": (
        lambda out: weights(out, "reward").write_text("weights"),
        ("cannot be read", "adapter_model.safetensors", ANEW),
    ),
    "pickled weights": (pickled, ("there is adapter_model.bin, but pickles are never read", "safetensors", ANEW)),
    "no configuration": (
        lambda out: (out / "reward" / "adapter" / "adapter_config.json").unlink(),
        ("its configuration cannot be read", "reward/adapter", ANEW),
    ),
    "half a configuration": (
        lambda out: (out / "reward" / "adapter" / "adapter_config.json").write_text("{"),
        ("its configuration cannot be read", "reward/adapter", ANEW),
    ),
    "a list for a configuration": (
        lambda out: (out / "reward" / "adapter" / "adapter_config.json").write_text("[]"),
        ("its configuration cannot be read", "reward/adapter", ANEW),
    ),
    "another rank": (another_rank, ("has another rank", "is (4, 64), here (2, 64)", "Set lora.rank")),
    "another alpha": (
        edit("adapter_config.json", lora_alpha=64),
        ("has another rank, alpha", "Set lora.rank, alpha"),
    ),
    "a tensor less": (a_tensor_less, ("is missing, here (2, 64)", "Set lora.rank")),
    "another role": (
        sft_in_its_place,
        ("another role (it says sft, here reward)", "to train it here, remove {out}/reward and run"),
    ),
    "another base": (
        edit("perl.json", base_sha256="0" * 64, base="org/other"),
        (
            "another base (it says 000000000000, here ",
            "it was trained on org/other by recipe tiny",
            "to train it here",
        ),
    ),
    "all that can differ": (
        edit("perl.json", base_sha256="1", tokenizer_sha256="2", chat_sha256="3", end_id=4, recipe_sha256="5"),
        (
            "another base (it says 1, here ",
            "another tokenizer (it says 2, here ",
            "another chat format (it says 3, here ",
            "another end-of-turn token (it says 4, here 3)",
            "another recipe (it says 5, here ",
        ),
    ),
}


@pytest.mark.parametrize(("spoil", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter_is_refused(
    spoil: Callable[[Path], object], says: tuple[str, ...], out: Path, refused_in: RefusedIn
) -> None:
    spoil(out)
    refused_in(tuple(phrase.format(out=out) for phrase in says), "evaluate", out, "reward")


def test_an_adapter_of_another_recipe_is_refused(
    out: Path, tiny_llama: Path, mixed_data: Path, refused_in: RefusedIn, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    theirs = run_recipe(other, tiny_llama, mixed_data, name="other", seed=5, sft=None, rl=None)
    shutil.rmtree(out / "reward" / "adapter")
    shutil.copytree(theirs / "reward" / "adapter", out / "reward" / "adapter")
    written = refused_in(("another recipe (it says ", "by recipe other", "remove "), "evaluate", out, "reward")
    assert "another base" not in written


def test_a_run_on_another_base_is_refused(
    out: Path, tiny_llama: Path, refused_in: RefusedIn, run_cli: RunCli, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    lm = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        lm.lm_head.weight[0] += 1
    lm.save_pretrained(other)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["base"]["model"] = str(other)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    written = refused_in(("another base", str(tiny_llama)), "evaluate", out, "policy")
    assert "another tokenizer" not in written


def test_a_policy_whose_sft_was_trained_again_is_refused(out: Path, refused_in: RefusedIn) -> None:
    tensors = load_file(weights(out, "sft"))
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, weights(out, "sft"), {"format": "pt"})
    remedy = f"to train it here, remove {out}/policy and run the recipe"
    written = refused_in(("another parent sft (it says ", "policy/adapter", remedy), "evaluate", out, "policy")
    assert "another base" not in written


def no_values(step: Path) -> None:
    (step / "state.json").unlink()


def half_the_values(step: Path) -> None:
    (step / "state.json").write_text((step / "state.json").read_text()[:30])


def cut_tensors(step: Path) -> None:
    file = step / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def doubled_rank(step: Path) -> None:
    """Change a checkpoint into a valid one of adapters with twice the rank."""
    file = step / "state.safetensors"
    tensors = load_file(file)
    save_file({name: torch.cat([t, t]) if "lora_A" in name else t for name, t in tensors.items()}, file)
    state = json.loads((step / "state.json").read_text())
    state["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (step / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_values, "this checkpoint is damaged"),
        (half_the_values, "this checkpoint is damaged"),
        (cut_tensors, "state.safetensors is not the file that was written"),
        (doubled_rank, "this checkpoint has other adapters"),
    ],
)
@pytest.mark.parametrize("role", ["reward", "policy"])
def test_a_checkpoint_that_does_not_fit_is_refused(
    role: str, spoil: Callable[[Path], None], says: str, out: Path, run_cli: RunCli
) -> None:
    (out / role / "result.json").unlink()
    newest = max((out / role / "checkpoints").iterdir())
    spoil(newest)
    before = contents(out)
    status, written = run_cli("run", out / "recipe.yaml", "--out", out)
    assert status == 2, written
    assert "Traceback" not in written
    assert says in written
    assert str(newest.parent) in written
    assert "Remove that folder" in written
    assert contents(out) == before


def test_damaged_adapters_come_back_from_their_checkpoints(out: Path, run_cli: RunCli) -> None:
    """The messages' remedy works: remove the damaged files and run again."""
    learned = {role: weights(out, role).read_bytes() for role in ("sft", "reward", "policy", "critic")}
    weights(out, "reward").write_bytes(learned["reward"][:-100])
    (out / "reward" / "result.json").unlink()
    (out / "policy" / "result.json").unlink()
    shutil.rmtree(max((out / "policy" / "checkpoints").iterdir()))
    status, written = run_cli("run", out / "recipe.yaml", "--out", out)
    assert status == 0, written
    assert {role: weights(out, role).read_bytes() for role in learned} == learned
