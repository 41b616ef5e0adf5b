"""The reward stage: its losses, its rows, and what it writes."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from perl.stages.reward import pairs_loss, thumbs_loss
from tests.conftest import RunCli, WriteRecipe


def test_the_loss_on_pairs_equals_trls(tiny_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_labels, config.initializer_range = 1, 0.3
    model = LlamaForSequenceClassification(config)
    rows = [{"prompt": "A", "chosen": f" tea {'x' * n}", "rejected": f" cocoa {'y' * (7 - n)}"} for n in range(6)]
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
    ours = pairs_loss(*scores_B.chunk(2))
    assert scores_B.std() > 0.1
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)


def test_thumbs_loss_by_hand() -> None:
    # -log σ(0) = log 2; -log(1 - σ(log 3)) = log 4; weights 3 and 1: (3 log 2 + log 4) / 2 = 2.5 log 2.
    loss = thumbs_loss(torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]))
    assert float(loss) == pytest.approx(2.5 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(("loss", "file"), [("thumbs", "ratings"), ("pairs", "pairs")])
def test_a_reward_only_recipe_trains_writes_and_is_evaluated(
    loss: str, file: str, run_cli: RunCli, write_recipe: WriteRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        data={"source": "jsonl", "path": str(small_data / f"{file}.jsonl"), "held_out": 0.3},
        reward={"loss": loss, "epochs": 40, "batch_size": 4, "learning_rate": 0.01},
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
    assert report["stages"]["reward"]["eval"]["auroc"] == 1.0  # good and bad answers differ by their words
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    code, text = run_cli("evaluate", str(out), "reward", "--json", str(tmp_path / "figures.json"))
    assert code == 0, text
    figures = json.loads((tmp_path / "figures.json").read_text())
    recorded = report["stages"]["reward"]["eval"]
    assert figures == recorded  # an adapter reloaded from disk scores as it did in memory
