"""`evaluate RUN reward`: the card in JSON and in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunCli, WriteRecipe, write_rows

DISHES = ["soup", "rice", "bread", "cake", "pie", "stew", "toast", "salad", "curry", "pasta", "beans", "eggs"]


def rows(dishes: list[str], **more: Any) -> list[dict[str, Any]]:
    """Ratings of three good and three bad answers for each dish."""
    return [
        {"prompt": [{"role": "user", "content": f"Some {dish}."}], "completion": text, "label": label, **more}
        for dish in dishes
        for size in ("Small", "Large", "Huge")
        for text, label in ((f"One {dish}. {size}?", True), (f"No {size}.", False))
    ]


@pytest.fixture
def trained(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """The folder of a run that learnt to tell these apart."""
    file = write_rows(tmp_path / "learn.jsonl", rows(DISHES))
    recipe = write_recipe(
        data={"source": "jsonl", "path": str(file), "held_out": 0.2},
        reward={"loss": "thumbs", "epochs": 8, "batch_size": 8, "learning_rate": 0.01, "max_length": 64},
        rl=None,
    )
    status, written = run_cli("run", recipe, "--out", tmp_path / "out")
    assert status == 0, written
    assert "Not fit for RL" in written  # of a dozen held-out answers nothing can be told
    assert "Too few to tell" in written
    return tmp_path / "out"


def test_the_card_of_other_data(trained: Path, run_cli: RunCli, tmp_path: Path) -> None:
    others = [f"{kind} {dish}" for kind in ("red", "green", "old") for dish in DISHES]
    mixed = rows(others[:20], source="menu") + rows(others[20:], source="counter")
    file = write_rows(tmp_path / "others.jsonl", mixed)
    status, written = run_cli("evaluate", trained, "reward", "--data", file, "--json", tmp_path / "card.json")
    assert status == 0, written
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["n"], card["up"], card["dialogues"], card["seen_in_training"]) == (216, 108, 36, 0)
    assert {"auroc", "balanced_accuracy", "accuracy", "majority_accuracy", "ece", "pairwise_accuracy"} <= set(card)
    assert {"calibration", "slices", "length", "floor", "mistakes", "verdict", "reliability"} <= set(card)
    assert card["majority_accuracy"] == 0.5
    # TF-IDF tells these apart as well as anything can, so nothing can be shown to be better.
    assert card["floor"]["value"] == 1.0
    assert not card["verdict"]["fit"]
    sources = {one["name"]: one["n"] for one in card["slices"] if one["by"] == "source"}
    assert sources == {"menu": 120, "counter": 96}
    for words in ("Not fit for RL", "no better than TF-IDF", "AUROC", "Calibration error", "not compared"):
        assert words in written
    assert len(written.splitlines()) <= 12, written


def test_answers_that_it_learnt_from_do_not_count(trained: Path, run_cli: RunCli, tmp_path: Path) -> None:
    file = tmp_path / "learn.jsonl"
    status, _ = run_cli("evaluate", trained, "reward", "--data", file, "--json", tmp_path / "card.json")
    assert status == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["n"] == 72
    assert card["seen_in_training"] == 60
    assert not card["verdict"]["fit"]
    assert "60 of these 72 answers are of dialogues it was trained on" in card["verdict"]["reasons"][0]
