"""The reward stage: its losses, rows and output files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from perl.backbones.chat import ChatFormat
from perl.backbones.tokens import Tokens
from perl.recipe import load_recipe
from perl.stages.opening import open_session
from perl.stages.reward import check, train_reward
from perl.stages.reward_loss import loss_at_best_temperature, pairs_losses, thumbs_losses
from tests.conftest import DRINKS, RunCli, WriteRecipe, write_rows


@pytest.mark.parametrize("margins", [None, [0.0, 0.5, 2.0, 0.1, 0.0, 30.0]])
def test_the_loss_on_pairs_equals_trls(margins: list[float] | None, tiny_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_labels, config.initializer_range = 1, 0.3
    model = LlamaForSequenceClassification(config)
    rows = [{"prompt": "A", "chosen": f" tea {'x' * n}", "rejected": f" cocoa {'y' * (7 - n)}"} for n in range(6)]
    if margins is not None:
        rows = [{**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)]
    arguments = RewardConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    trainer = RewardTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch))
        scores_B = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    better_P, worse_P = scores_B.chunk(2)
    margins_P = batch.get("margin", torch.zeros_like(better_P))
    ours = pairs_losses(better_P, worse_P, margins_P, torch.ones_like(better_P)).mean()
    assert scores_B.std() > 0.1
    assert (margins is None) == (margins_P.sum() == 0)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_soft_pairs_loss_by_hand() -> None:
    # σ(z) = 3/4 at z = log 3: -(0.6 log 3/4 + 0.4 log 1/4), once as a difference and once less a margin of 1.
    log3 = math.log(3)
    better_P, worse_P = torch.tensor([log3, log3 + 2]), torch.tensor([0.0, 1.0])
    losses_P = pairs_losses(better_P, worse_P, torch.tensor([0.0, 1.0]), torch.tensor([0.6, 0.6]))
    expected = -(0.6 * math.log(3 / 4) + 0.4 * math.log(1 / 4))
    assert losses_P.tolist() == pytest.approx([expected, expected], rel=1e-6)


def test_soft_thumbs_loss_by_hand() -> None:
    # σ(log 3) = 3/4: -(0.6 log 3/4 + 0.4 log 1/4), weighted by 2. Best for a label of 0.6 is log 0.6/0.4.
    loss_T = thumbs_losses(torch.tensor([math.log(3)]), torch.tensor([0.6]), torch.tensor([2.0]))
    assert float(loss_T) == pytest.approx(-2 * (0.6 * math.log(3 / 4) + 0.4 * math.log(1 / 4)), rel=1e-6)
    score = torch.tensor([math.log(0.6 / 0.4)], requires_grad=True)
    thumbs_losses(score, torch.tensor([0.6]), torch.tensor([1.0])).sum().backward()
    assert float(score.grad) == pytest.approx(0, abs=1e-7)


def test_thumbs_loss_by_hand() -> None:
    # -log σ(0) = log 2; -log(1 - σ(log 3)) = log 4; weights 3 and 1: (3 log 2 + log 4) / 2 = 2.5 log 2.
    losses_T = thumbs_losses(torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]))
    assert float(losses_T.mean()) == pytest.approx(2.5 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "file", "term"),
    [("thumbs", "ratings", None), ("pairs", "pairs", "tfidf"), ("thumbs", "ratings", "likelihood")],
)
def test_a_reward_only_recipe_trains_writes_and_is_evaluated(
    loss: str,
    file: str,
    term: str | None,
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    small_data: Path,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(
        data={"source": "jsonl", "path": str(small_data / f"{file}.jsonl"), "held_out": 0.3},
        reward={
            "loss": loss,
            "epochs": 40,
            "batch_size": 4,
            "learning_rate": 0.01,
            **({"eval_steps": 20, "validation_share": 0.4, term: True} if term else {}),
        },
        rl=None,
        sft=None,
    )
    out = tmp_path / "out"
    code, text = run_cli("run", str(recipe), "--out", str(out))
    assert code == 0, text
    config = json.loads((out / "reward" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    weights = load_file(out / "reward" / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.score.weight"].abs().sum() > 0
    report = json.loads((out / "report.json").read_text())
    metric = "pairwise_accuracy" if loss == "pairs" else "auroc"
    assert report["stages"]["reward"]["eval"][metric] == 1.0  # good and bad answers differ by their words
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    code, text = run_cli("evaluate", str(out), "reward", "--json", str(tmp_path / "figures.json"))
    assert code == 0, text
    metrics = json.loads((tmp_path / "figures.json").read_text())
    recorded = report["stages"]["reward"]["eval"]
    assert metrics == recorded  # an adapter reloaded from disk scores as it did in memory
    learned = {"likelihood": "out.weight", "tfidf": "weights_2V"}
    if term is None:
        assert not any(part in name for part in learned for name in weights)
    else:
        assert weights[f"base_model.model.{term}.{learned[term]}"].abs().sum() > 0
        code, text = run_cli("export", str(out), "reward", str(tmp_path / "exported"))
        assert code == 2
        assert f"no head with {term}" in text


def answers_to(drinks: list[str]) -> list[dict[str, Any]]:
    """Return ratings that distinguish some answers, and pairs that distinguish others."""
    rows: list[dict[str, Any]] = []
    for drink in drinks:
        asked = [{"role": "user", "content": f"A {drink}, please."}]
        rows += [
            {"prompt": asked, "completion": f"One {drink}. What size?", "label": True},
            {"prompt": asked, "completion": "No.", "label": False},
            {"prompt": asked, "completion": "Go away!", "label": False},
            {"prompt": asked, "chosen": "With pleasure.", "rejected": f"Whatever, {drink}.", "margin": 1},
            {"prompt": asked, "chosen": f"At once, {drink}.", "rejected": "Later.", "margin": 1},
        ]
    return rows


def logged_losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "reward" / "metrics.jsonl").read_text().splitlines()]


def test_an_answer_is_tokenized_once_for_checks_training_and_validation(
    small_data: Path, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[Any, ...]] = []
    row = ChatFormat.row

    def counted(chat: ChatFormat, *arguments: Any) -> Tokens:
        read.append(arguments)
        return row(chat, *arguments)

    data = {"source": "jsonl", "path": str(small_data / "ratings.jsonl"), "held_out": 0.3}
    recipe = write_recipe(data=data, reward={"epochs": 1, "eval_steps": 2}, rl=None, sft=None)
    session = open_session(load_recipe(recipe), tmp_path)
    monkeypatch.setattr(ChatFormat, "row", counted)
    check(session)
    train_reward(session)
    rows = [answer for answer in read if len(answer) == 3]  # those with a length
    assert len(rows) == len(set(rows)) > 0
    assert not session.answer_tokens


def test_both_learns_ratings_and_pairs_in_one_training(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    own = write_rows(tmp_path / "own.jsonl", answers_to(DRINKS))
    recipe = write_recipe(
        seed=1,  # decides which drinks are held out: what a random base learned carries over to these
        data={"source": "jsonl", "path": str(own), "held_out": 0.3},
        lora={"rank": 2, "alpha": 4, "layers": "top-half"},  # the lower layer's activations of each row are cached
        reward={"loss": "both", "epochs": 40, "batch_size": 64, "learning_rate": 0.01},
        rl=None,
    )
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    losses = logged_losses(tmp_path / "out")
    assert len(losses) == 40, "a batch has all 35 rows of 7 dialogues"
    # A new head scores 0: log 2 for each of three ratings (the weights sum to three), log(1 + e) for each pair.
    assert losses[0] == pytest.approx((3 * math.log(2) + 2 * math.log(1 + math.e)) / 5, rel=1e-3)
    assert losses[-1] < 0.1 * losses[0]
    card = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["reward"]["eval"]
    assert (card["n"], card["pairs"]) == (9, 6)
    assert (card["auroc"], card["pairwise_accuracy"]) == (1.0, 1.0)
    stamp = json.loads((tmp_path / "out" / "reward" / "adapter" / "perl.json").read_text())
    assert stamp["reward_is_probability"] is True
    code, text = run_cli("evaluate", tmp_path / "out", "reward", "--json", tmp_path / "figures.json")
    assert code == 0, text
    assert json.loads((tmp_path / "figures.json").read_text()) == card


def test_soft_labels_are_learned_as_they_are(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    soft = {True: 0.7, False: 0.3}
    rows = [{**row, "label": soft[row["label"]]} if "label" in row else row for row in answers_to(DRINKS)]
    rows = [{**row, "margin": None, "probability": 0.7} if "margin" in row else row for row in rows]
    recipe = write_recipe(
        data={"source": "jsonl", "path": str(write_rows(tmp_path / "own.jsonl", rows)), "held_out": 0.3},
        reward={"loss": "both", "epochs": 40, "batch_size": 64, "learning_rate": 0.01},
        rl=None,
    )
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    losses = logged_losses(tmp_path / "out")
    assert min(losses) > entropy - 1e-4, "no score can do better on average than the labels are sure"
    assert losses[-1] == pytest.approx(entropy, abs=0.01)
    card = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["reward"]["eval"]
    assert (card["auroc"], card["pairwise_accuracy"]) == (1.0, 1.0)


@pytest.mark.parametrize(("file", "what"), [("pairs", "no ratings, only pairs"), ("ratings", "neither pairs nor")])
def test_both_wants_ratings_and_pairs(
    file: str, what: str, run_cli: RunCli, write_recipe: WriteRecipe, small_data: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Q{n}", "completion": "a", "label": n % 2} for n in range(20)]
    path = small_data / "pairs.jsonl" if file == "pairs" else write_rows(tmp_path / "ratings.jsonl", rows)
    recipe = write_recipe(data={"source": "jsonl", "path": str(path), "held_out": 0.3}, rl=None)
    code, text = run_cli("run", recipe, "reward.loss=both", "--out", tmp_path / "out")
    assert code == 2
    assert what in text
    assert "reward.loss" in text


def test_both_makes_its_pairs_from_ratings_where_there_are_none(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(rl=None)  # ratings of one context with both labels
    code, text = run_cli("run", recipe, "reward.loss=both", "reward.batch_size=64", "--out", tmp_path / "out")
    assert code == 0, text
    card = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["reward"]["eval"]
    assert (card["n"], card["pairs"]) == (6, 3)
    assert logged_losses(tmp_path / "out") == [pytest.approx(math.log(2), rel=1e-3)]


def test_the_loss_at_the_best_temperature_by_hand() -> None:
    # Scores of 40 and -40 that are right in three of four cases: the best are ±log 3, and the loss is the entropy.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    none, ones = torch.zeros(0), torch.ones(4)
    rated = {"margins_P": none, "weights_T": ones, "targets_E": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    pairs = {"margins_P": torch.zeros(4), "weights_T": none, "targets_E": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    scores_4 = torch.full((4,), 40.0)
    for scores_B, batch in ((scores_4, rated), (torch.cat([scores_4, 0 * scores_4]), pairs)):
        found = loss_at_best_temperature(
            [(scores_B, batch), (-scores_B, batch | {"targets_E": 1 - batch["targets_E"]})]
        )
        assert found == pytest.approx(entropy, rel=1e-6)
    # A scorer that ranks in the wrong order gets weight 0.
    assert loss_at_best_temperature([(-scores_4, rated)]) == pytest.approx(math.log(2), abs=1e-2)
