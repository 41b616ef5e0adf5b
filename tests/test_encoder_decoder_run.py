"""All three stages on a tiny T5 and a tiny BART, from the recipe to folders that peft and transformers load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

import perl
from perl.backbones.encoder_decoder_format import START
from perl.commands.export import export
from perl.data.records import Turn
from perl.errors import UserError
from perl.predict import predict, read_subject
from perl.recipe import Recipe
from perl.roles.role import Role
from perl.runs.folder import RunFolder
from perl.stages.pipeline import run
from perl.stages.sft_encoder_decoder import EncoderDecoderTrainer
from tests.commands.test_export import assert_same, card_code
from tests.conftest import BRIEF, RunCli
from tests.encoder_decoders import MAKERS, T5, tiny_t5
from tests.exported import Run, make, recipe_on
from tests.predict.test_memory import SHORT, assert_close, dialogues, measured, predicted
from tests.predict.test_memory import recipe as recipe_of
from tests.stopping import stopped_after

__all__ = ["dialogues"]  # a fixture

RL = {
    **BRIEF,
    "steps": 1,
    "prompts_per_step": 4,
    "samples_per_prompt": 2,
    "micro_batch_size": 4,
    "max_new_tokens": 6,
    "eval_prompts": 2,
    "learning_rate": 0.01,
}
CONTEXT = [Turn("user", "A latte, please.")]
ANSWER = Turn("agent", "What size?")


def tiny_recipe(base: Path, data: Path, **changes: Any) -> Recipe:
    sft = {"epochs": 3, "batch_size": 4, "learning_rate": 0.02, "max_length": 64}
    reward = {"epochs": 4, "batch_size": 4, "learning_rate": 0.02, "max_length": 64}
    rl = {**RL, "algorithm": "ppo", "critic": "adapter", **changes.pop("rl", {})}
    return recipe_on(base, data, **{"sft": sft, "reward": reward, "rl": rl, **changes})


@pytest.fixture(scope="module")
def runs(mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of whole runs with LoRA; on T5, the critic has its own weights and roles share a block."""
    found = {}
    for name, maker in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        critic, layers = ("shared", "all") if name == "bart" else ("adapter", [1])
        changes = {"rl": {"critic": critic}, "lora": {"rank": 2, "alpha": 4, "layers": layers}}
        recipe = tiny_recipe(maker(folder / "base"), mixed_data, checkpoint_every=3, **changes)
        run(recipe, folder / "run")
        found[name] = folder / "run"
    return found


@pytest.mark.parametrize("name", list(MAKERS))
def test_all_stages_run_and_learn_and_the_base_stays(name: str, runs: dict[str, Path]) -> None:
    report = json.loads((runs[name] / "report.json").read_text())
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    sft, reward, rl = (report["stages"][stage]["eval"] for stage in ("sft", "reward", "rl"))
    assert sft["loss_after"] < sft["loss_before"] - 0.5
    assert reward["auroc"] == 1.0  # "No." or not
    assert rl["reward_before"] != rl["reward_after"]
    first = json.loads((runs[name] / "policy" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["sampler_mismatch"] < 1e-4
    assert abs(first["kl"]) < 1e-3  # the policy begins as the SFT policy
    assert report["stages"]["sft"]["flops"] > 0


@pytest.mark.parametrize("name", list(MAKERS))
@torch.no_grad()
def test_an_exported_policy_writes_and_says_what_the_runs_own_does(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Run(runs[name])
    made.session.load(Role.POLICY)
    roles, chat = made.session.roles, made.session.base.chat
    ids, prompt = chat.row(CONTEXT, ANSWER).ids, chat.context(CONTEXT)
    whole = torch.tensor([ids])
    length = len(ids) - len(prompt)
    expected = roles(
        Role.POLICY, whole, torch.ones_like(whole).bool(), completion_length=length, temperature=1.0
    ).log_probs_BT
    source, written = torch.tensor([ids[: ids.index(START)]]), ids[ids.index(START) + 1 :]
    for merged, kind in ((False, AutoPeftModelForSeq2SeqLM), (True, AutoModelForSeq2SeqLM)):
        out = tmp_path / f"out-{merged}"
        export(made.folder, "policy", out, merged)
        model = kind.from_pretrained(out).eval()
        logits_TV = model(input_ids=source, labels=torch.tensor([written])).logits[0, -length:]
        found = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[-length:])[:, None])[:, 0]
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)
        settings = GenerationConfig.from_pretrained(out)
        assert settings.decoder_start_token_id == roles.backbone.config.decoder_start_token_id
        assert settings.forced_bos_token_id == (chat.first_ids[0] if chat.first_ids else None)
        assert isinstance(card_code(out, monkeypatch)["answer"], str)


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_card_of_a_reward_model_holds_the_code_that_scores(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Run(runs[name])
    export(made.folder, "reward", tmp_path / "out", False)
    found = card_code(tmp_path / "out", monkeypatch)
    dialogues = [found["dialogue"], [{"role": "user", "content": "Tea."}, {"role": "assistant", "content": "No."}]]
    expected = made.scores(Role.REWARD, dialogues)
    assert_same(torch.stack([found["scores"][0], expected[1]]).detach(), expected)
    with pytest.raises(UserError, match=r"has no classifier of .*ForConditionalGeneration") as caught:
        export(made.folder, "reward", tmp_path / "merged", True)
    assert "without --merge" in str(caught.value)


def test_it_is_used_from_python_as_any_other(runs: dict[str, Path]) -> None:
    opened = perl.load_run(runs["bart"])
    prompts: Any = [[{"role": "user", "content": "A latte, please."}]]
    assert len(opened.generate(prompts, role="policy")) == 1
    assert len(opened.score(prompts, ["What size?"])) == 1


def test_rl_evaluates_from_disk_to_the_same(runs: dict[str, Path], run_cli: RunCli, tmp_path: Path) -> None:
    for role in ("policy", "reward"):
        code, text = run_cli("evaluate", runs["t5"], role, "--json", tmp_path / "found.json")
        assert code == 0, text
        found = json.loads((tmp_path / "found.json").read_text())
        stages = json.loads((runs["t5"] / "report.json").read_text())["stages"]
        evaluated = stages["rl" if role == "policy" else "reward"]["eval"]
        name = "reward_after" if role == "policy" else "auroc"
        assert found[name] == pytest.approx(evaluated[name], abs=1e-5)


def test_sft_goes_on_from_a_checkpoint_to_the_same_bytes(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RunFolder(runs["t5"]).recipe().model_copy(update={"reward": None, "rl": None})
    with stopped_after(EncoderDecoderTrainer, 4, monkeypatch):
        run(recipe, tmp_path / "stopped")
    run(recipe, tmp_path / "stopped")
    place = "sft/adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / place).read_bytes() == (runs["t5"] / place).read_bytes()


def test_full_tuning_has_a_model_for_each_role(mixed_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_t5(tmp_path / "base"), mixed_data, tuning="full", sft=None)
    run(recipe, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["stages"]["rl"]["trainable_parameters"] == 2 * report["base"]["parameters"] + 32
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "policy" / "model")
    assert model(input_ids=torch.tensor([[5, 1]]), labels=torch.tensor([[6, 1]])).loss.isfinite()


def test_what_it_will_need_is_what_it_takes(dialogues: Path) -> None:
    lora = {"rank": 4, "alpha": 8, "layers": [1]}  # roles share a block of the encoder
    tried = random_t5(dialogues, 2, critic="adapter", stages="rl", lora=lora)
    assert_close(predicted(tried), measured(tried), 0.01)


def test_of_a_deep_one_it_is_extrapolated(dialogues: Path) -> None:
    tried = random_t5(dialogues, 7, stages="sft")
    deep, whole = predict(tried, read_subject(tried))["sft"], measured(tried)["sft"]
    for phase, (peak, _) in whole.items():
        assert deep[phase].peak == pytest.approx(peak, rel=0.05)


def random_t5(rows: Path, layers: int, **changes: Any) -> Recipe:
    """Return a recipe on a random T5 given by its configuration."""
    config = {"model_type": "t5", **T5, "num_layers": layers, "num_decoder_layers": layers}
    recipe = recipe_of(rows, layers, SHORT, dtype="float32", **changes)
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={"config": config})})


def test_a_plain_text_run_exports_its_text_format(
    mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"Q{number}: tea?", "chosen": " Yes.", "rejected": f" No {number}."} for number in range(10)
    ]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_on(tiny_t5(tmp_path / "base"), data, sft=None, rl=None, reward={"loss": "pairs"})
    made = Run(make(tmp_path / "run", recipe))
    export(made.folder, "reward", tmp_path / "out", False)
    found = card_code(tmp_path / "out", monkeypatch)["scores"]
    torch.testing.assert_close(
        found, made.scores(Role.REWARD, [("A prompt", "and its answer.")]), rtol=0, atol=1e-5
    )
