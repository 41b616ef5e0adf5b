"""All three stages on one base: the files that `run` writes; stages share only adapter folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

from perl.backbones.loading import load_base
from perl.data.records import Demonstration, Turn
from perl.errors import UserError
from perl.recipe import load_recipe
from perl.roles.role import Role
from perl.roles.saved import load_role, read_stamp, weights_sha256
from perl.roles.shared_base import SharedBase
from perl.stages.opening import open_session
from perl.stages.sft import check, tokenized, train_sft
from tests.blank import drawn
from tests.conftest import RunCli, WriteRecipe, command, recipe_file
from tests.tiny import lora

SFT = {"epochs": 4, "batch_size": 4, "learning_rate": 0.01}
REWARD = {"loss": "thumbs", "epochs": 4, "batch_size": 4, "learning_rate": 0.01}
RL = {"steps": 2, "prompts_per_step": 4, "micro_batch_size": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def finished(
    tiny_llama: Path, small_data: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the read-only folder of a run of all three stages, with a page that has its plots."""
    folder = tmp_path_factory.mktemp("finished")
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    stages = {"sft": SFT, "reward": REWARD, "rl": RL | {"reward": {}}}
    recipe = recipe_file(folder, tiny_llama, small_data, data=data, **stages)
    with drawn():
        code, text = command("run", recipe, "--out", folder / "out")
    assert code == 0, text
    return folder / "out"


def test_a_run_writes_what_the_contract_promises(finished: Path, run_cli: RunCli) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert {"name", "seed", "tuning", "versions", "hardware", "base", "stages"} <= report.keys()
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    assert list(report["stages"]) == ["sft", "reward", "rl"]
    for stage in report["stages"].values():
        assert stage["trainable_parameters"] > 0
        assert stage["seconds"] > 0
        assert stage["tokens_per_second"] > 0
        assert stage["peak_memory_bytes"] > 4 * report["base"]["parameters"]
    sft = report["stages"]["sft"]["eval"]
    assert sft["loss_after"] < sft["loss_before"]
    assert {"reward_before", "reward_after", "kl", "n", "algorithm", "steps"} <= report["stages"]["rl"][
        "eval"
    ].keys()
    for role in ("sft", "reward", "policy", "critic"):
        folder = finished / role / "adapter"
        assert {"adapter_config.json", "adapter_model.safetensors", "perl.json"} <= {
            f.name for f in folder.iterdir()
        }
    for role in ("sft", "reward", "policy"):
        assert (finished / role / "metrics.jsonl").read_text().count("\n") >= 2
    assert load_recipe(finished / "recipe.yaml") == load_recipe(finished / "recipe.yaml")
    code, text = run_cli("evaluate", str(finished), "policy")
    assert code == 0, text
    assert "change (95 %)" in text


def test_adapters_load_into_plain_peft(finished: Path, tiny_llama: Path) -> None:
    policy = AutoPeftModelForCausalLM.from_pretrained(finished / "policy" / "adapter")
    assert any("lora_A" in name for name, _ in policy.named_parameters())
    base, lm = load_base(str(tiny_llama), torch.float32, torch.device("cpu"))
    roles = SharedBase(lora(lm, 2, 4))
    load_role(roles, Role.REWARD, finished / "reward" / "adapter", base)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        finished / "reward" / "adapter", num_labels=1
    ).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny_llama)("A latte, please.").input_ids])
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        actual = roles(Role.REWARD, ids, torch.ones_like(ids, dtype=torch.bool), head=Role.REWARD).scores_B
    assert actual.abs() > 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_sft_is_that_of_transformers_over_all_tokens(finished: Path, tmp_path: Path) -> None:
    """Rows have several lengths, so a mean over batches would differ."""
    policy = AutoPeftModelForCausalLM.from_pretrained(finished / "sft" / "adapter").eval()
    session = open_session(load_recipe(finished / "recipe.yaml"), tmp_path / "out")
    rows = tokenized(session, session.held_out.demonstrations)
    found = json.loads((finished / "report.json").read_text())["stages"]["sft"]["eval"]
    total, tokens, values = 0.0, 0, []
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            values.append(float(policy(ids, labels=labels).loss))
        total, tokens = total + values[-1] * count, tokens + count
    assert found["loss_after"] == pytest.approx(total / tokens, abs=1e-6)
    assert found["n"] == len(rows)
    low, high = found["loss_interval"]
    assert low < found["loss_after"] - found["loss_before"] < high < 0


def test_a_stamp_names_the_parent_and_refuses_another_base(
    finished: Path, tiny_llama: Path, tiny_gpt2: Path
) -> None:
    stamp = read_stamp(finished / "policy" / "adapter")
    other, other_lm = load_base(str(tiny_llama), torch.float32, torch.device("cpu"), random_seed=7)
    roles = SharedBase(lora(other_lm, 2, 4))
    assert stamp.parent_sha256 == weights_sha256(roles, finished / "sft" / "adapter")
    with pytest.raises(UserError, match="belongs to another base"):
        load_role(roles, Role.SFT, finished / "sft" / "adapter", other)
    same, same_lm = load_base(str(tiny_llama), torch.float32, torch.device("cpu"))
    narrow = SharedBase(lora(same_lm, 2, 8))
    with pytest.raises(UserError, match="another rank, alpha"):
        load_role(narrow, Role.SFT, finished / "sft" / "adapter", same)


def test_stages_run_one_by_one_come_to_the_same(
    finished: Path, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """RL with SFT and reward adapters read from disk equals RL with those in memory."""
    recipe, apart = str(finished / "recipe.yaml"), tmp_path / "apart"
    code, text = run_cli("rl", recipe, "--out", str(apart))
    assert code == 2
    assert "needs the adapter of sft" in text
    assert not apart.exists()
    for stage in ("sft", "reward", "rl"):
        code, text = run_cli(stage, recipe, "--out", str(apart))
        assert code == 0, text
    for role in ("sft", "reward", "policy", "critic"):
        weights = Path(role) / "adapter" / "adapter_model.safetensors"
        assert (apart / weights).read_bytes() == (finished / weights).read_bytes(), role


def test_sft_learns_agent_turns_only_and_leaves_the_base_as_it_was(
    write_recipe: WriteRecipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"source": "jsonl", "path": str(small_data / "demonstrations.jsonl"), "held_out": 0.3}
    recipe = load_recipe(write_recipe(data=data, sft=SFT, reward=None, rl=None))
    session = open_session(recipe, tmp_path / "out")
    turns = (Turn("user", "hello"), Turn("agent", "yes"), Turn("user", "thanks"), Turn("agent", "no"))
    row = tokenized(session, [Demonstration(turns[:1], turns[1:], "one")])[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    chat = session.base.chat
    assert learned == chat.completion(turns[:1], turns[1]) + chat.completion(turns[:3], turns[3])
    session.folder.claim(recipe)
    check(session)
    monkeypatch.setattr(chat, "rows", None)  # the rows of the check are trained on
    train_sft(session)
    assert session.sft_rows is None
    assert "forward" not in vars(session.roles.lm)  # TRL's patched forward is gone
    assert {name for name, p in session.roles.named_parameters() if p.requires_grad} == {
        name for name, _ in session.roles.named_parameters() if ".sft." in name
    }


def test_a_project_that_has_moved_goes_on_with_the_same_content(
    tiny_llama: Path, small_data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    shutil.copytree(tiny_llama, before / "model")
    shutil.copy(small_data / "ratings.jsonl", before)
    recipe_file(before, before / "model", before)
    status, text = run_cli("run", before / "recipe.yaml", "--out", before / "out")
    assert status == 0, text
    before.rename(after)
    recipe_file(after, after / "model", after)
    status, text = run_cli("run", after / "recipe.yaml", "--out", after / "out")
    assert status == 0, text
    assert "rl is already finished" in text
    moved = load_recipe(after / "out" / "recipe.yaml")
    assert (moved.base.model, moved.data.path) == (str(after / "model"), str(after / "ratings.jsonl"))

    after.rename(before)
    recipe_file(before, before / "model", before)
    with (before / "ratings.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": "b", "label": true}\n')
    status, text = run_cli("run", before / "recipe.yaml", "--out", before / "out")
    assert status == 2
    assert "the data have changed (1 row added)" in text
