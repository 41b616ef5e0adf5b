"""`reward.tfidf` with every loss, tuning and kind of base, and one or several members."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DRINKS, RunCli, WriteRecipe, write_rows

TFIDF = {
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.01,
    "eval_steps": 5,
    "validation_share": 0.4,
    "tfidf": True,
}


def rows(drinks: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for drink in drinks:
        asked = [{"role": "user", "content": f"A {drink}, please."}]
        found += [
            {"prompt": asked, "completion": f"One {drink}. What size?", "label": True},
            {"prompt": asked, "completion": "No.", "label": False},
            {"prompt": asked, "chosen": f"At once, {drink}.", "rejected": "Later."},
        ]
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": {"loss": "both"}},
        {"reward": {"members": 2}, "tuning": "full"},
        {"reward": {"members": 2, "likelihood": True, "bootstrap": True}},
    ],
    ids=["both", "full-members", "likelihood-members"],
)
def test_it_is_fitted_and_told(
    changes: dict[str, Any], run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", rows(DRINKS))), "held_out": 0.3}
    reward = TFIDF | changes.pop("reward")
    out = tmp_path / "out"
    code, text = run_cli("run", write_recipe(data=data, reward=reward, rl=None, **changes), "--out", out)
    assert code == 0, text
    blends = json.loads((out / "report.json").read_text())["stages"]["reward"]["blends"]
    assert len(blends) == reward.get("members", 1)
    assert all(one["model"] > 0 and one["words"] > 0 for one in blends)
    assert "Scores are the sum of the model's score and a TF-IDF score" in " ".join(text.split())


def test_a_single_pair_to_validate_on(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    pairs = [row for row in rows(DRINKS[:6]) if "chosen" in row]
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "pairs.jsonl", pairs)), "held_out": 0.3}
    reward = TFIDF | {"loss": "pairs", "validation_share": 0.1}
    code, text = run_cli("run", write_recipe(data=data, reward=reward, rl=None), "--out", tmp_path / "out")
    assert code == 0, text


def test_an_adapter_trained_with_it_says_so(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", rows(DRINKS))), "held_out": 0.3}
    code, text = run_cli("run", write_recipe(data=data, reward=TFIDF, rl=None), "--out", tmp_path / "a")
    assert code == 0, text
    start = {"epochs": 1, "adapter": str(tmp_path / "a" / "reward" / "adapter")}
    code, text = run_cli("run", write_recipe(data=data, reward=start, rl=None), "--out", tmp_path / "b")
    assert code == 2
    assert "was trained with reward.tfidf" in " ".join(text.split())
