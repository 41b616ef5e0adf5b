"""Whole runs with full tuning."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from perl.errors import UserError
from perl.recipe import load_recipe
from perl.roles.saved import read_stamp
from tests.conftest import RunCli, WriteRecipe

SFT = {"epochs": 4, "batch_size": 4, "learning_rate": 0.003}
REWARD = {"loss": "thumbs", "epochs": 4, "batch_size": 4, "learning_rate": 0.003}
RL = {"steps": 3, "prompts_per_step": 4, "micro_batch_size": 4, "max_new_tokens": 6, "reward": {}}


def settings(mixed_data: Path, tuning: str, **rl: Any) -> dict[str, Any]:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    return {"tuning": tuning, "data": data, "sft": SFT, "reward": REWARD, "rl": RL | rl}


def test_full_tuning_of_4_bit_weights_is_refused(write_recipe: WriteRecipe, run_cli: RunCli) -> None:
    base = {"model": "some/model", "quantization": "4bit"}
    file = write_recipe(tuning="full", base=base)
    with pytest.raises(UserError, match="full tuning cannot train 4-bit weights"):
        load_recipe(file)
    assert load_recipe(file, ["tuning=lora"]).base.quantization == "4bit"
    code, text = run_cli("run", str(file))
    assert code == 2
    assert "4-bit" in text


def test_full_tuning_in_float16_is_refused(write_recipe: WriteRecipe) -> None:
    """Its first update would already be infinite: the squares of gradients of 1e-4 are zero in float16."""
    weight = torch.nn.Parameter(torch.full((3,), 0.05, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 1e-4)
    torch.optim.AdamW([weight], lr=5e-5).step()
    assert not weight.isfinite().any()
    file = write_recipe(tuning="full", base={"model": "some/model", "dtype": "float16"})
    with pytest.raises(UserError, match="full tuning cannot train float16 weights"):
        load_recipe(file)


@pytest.fixture(scope="module")
def full_runs() -> dict[str, Path]:
    """Cache of finished runs' folders."""
    return {}


@pytest.fixture
def full(
    full_runs: dict[str, Path],
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    mixed_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the folder of a run of all three stages with full tuning, a separate critic and groups."""
    if "full" not in full_runs:
        out = tmp_path_factory.mktemp("full") / "out"
        recipe = write_recipe(**settings(mixed_data, "full", critic="adapter", samples_per_prompt=2))
        code, text = run_cli("run", str(recipe), "--out", str(out))
        assert code == 0, text
        full_runs["full"] = out
    return full_runs["full"]


def test_a_full_run_writes_a_model_for_each_role(full: Path) -> None:
    for role in ("sft", "reward", "policy", "critic"):
        assert {f.name for f in (full / role / "model").iterdir()} >= {
            "config.json",
            "model.safetensors",
            "perl.json",
        }
        assert not (full / role / "adapter").exists()
    report = json.loads((full / "report.json").read_text())
    assert report["tuning"] == "full"
    assert report["base"]["sha256_after"] is None
    assert len(report["base"]["sha256_before"]) == 64
    assert list(report["stages"]) == ["sft", "reward", "rl"]
    weights = report["base"]["parameters"]
    assert report["stages"]["sft"]["trainable_parameters"] == weights
    assert report["stages"]["reward"]["trainable_parameters"] == weights + 32
    assert report["stages"]["rl"]["trainable_parameters"] == 2 * weights + 32
    for stage in report["stages"].values():
        assert "adapters" not in stage["memory"]["load"]["kinds"]
    # Each stage holds only the roles that it needs: here that is one, one and four.
    sizes = [
        report["stages"][stage]["memory"]["load"]["peak"] / (4 * weights) for stage in ("sft", "reward", "rl")
    ]
    assert sizes == pytest.approx([1, 1, 4], rel=0.01)


def test_full_tuning_learns(full: Path) -> None:
    stages = json.loads((full / "report.json").read_text())["stages"]
    assert stages["sft"]["eval"]["loss_after"] < stages["sft"]["eval"]["loss_before"]
    first = json.loads((full / "policy" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # the policy begins as the SFT policy
    assert first["sampler_mismatch"] < 1e-5
    assert stages["rl"]["eval"]["kl"] != 0


def test_models_name_their_parents(full: Path) -> None:
    def sha256(role: str) -> str:
        return hashlib.sha256((full / role / "model" / "model.safetensors").read_bytes()).hexdigest()

    assert read_stamp(full / "sft" / "model").parent_sha256 is None
    assert read_stamp(full / "policy" / "model").parent_sha256 == sha256("sft")
    assert read_stamp(full / "critic" / "model").parent_sha256 == sha256("reward")
    assert len({sha256(role) for role in ("sft", "reward", "policy", "critic")}) == 4


def test_full_models_load_into_plain_transformers(full: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        policy = AutoModelForCausalLM.from_pretrained(full / "policy" / "model")(ids).logits
        sft = AutoModelForCausalLM.from_pretrained(full / "sft" / "model")(ids).logits
        score = AutoModelForSequenceClassification.from_pretrained(full / "reward" / "model")(ids).logits
    assert not torch.equal(policy, sft)
    assert score.shape == (1, 1)
    assert score.abs() > 1e-4


@pytest.mark.parametrize("role", ["reward", "policy"])
def test_a_full_run_can_be_evaluated(role: str, full: Path, run_cli: RunCli, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, text = run_cli("evaluate", str(full), role, "--json", str(file))
    assert code == 0, text
    metrics = json.loads(file.read_text())
    stage = json.loads((full / "report.json").read_text())["stages"]["rl" if role == "policy" else "reward"]
    compared = {name for name in metrics if isinstance(metrics[name], float) and name in stage["eval"]}
    assert compared
    for name in compared:  # models loaded from disk give the run's results for those in memory
        assert metrics[name] == pytest.approx(stage["eval"][name], abs=1e-5), name


def test_rl_alone_reads_full_models_from_disk_and_comes_to_the_same(
    full: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(full, again)
    for role in ("policy", "critic"):
        shutil.rmtree(again / role)
    (again / "report.json").unlink()
    code, text = run_cli("rl", str(full / "recipe.yaml"), "--out", str(again))
    assert code == 0, text
    for role in ("policy", "critic"):
        weights = Path(role) / "model" / "model.safetensors"
        assert (again / weights).read_bytes() == (full / weights).read_bytes(), role
    assert json.loads((again / "report.json").read_text())["stages"].keys() == {"sft", "reward", "rl"}


def test_a_full_runs_folder_is_not_taken_for_a_lora_runs(full: Path, run_cli: RunCli) -> None:
    code, text = run_cli("run", str(full / "recipe.yaml"), "tuning=lora", "--out", str(full))
    assert code == 2
    assert "tuning is 'full', here 'lora'" in " ".join(text.split())


def test_full_tuning_with_a_critic_on_the_policys_trunk(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    changes = settings(mixed_data, "full", critic="shared") | {"sft": None, "checkpoint_activations": True}
    code, text = run_cli("run", str(write_recipe(**changes)), "--out", str(tmp_path / "out"))
    assert code == 0, text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    weights = report["base"]["parameters"]
    assert report["stages"]["rl"]["trainable_parameters"] == weights + 32
    peak = report["stages"]["rl"]["memory"]["load"]["peak"]
    assert peak == pytest.approx(3 * 4 * weights, rel=0.01)  # base (the reference), reward and policy
    assert (tmp_path / "out" / "critic" / "model" / "model.safetensors").stat().st_size < 1000
    code, text = run_cli("evaluate", str(tmp_path / "out"), "policy")
    assert code == 0, text
