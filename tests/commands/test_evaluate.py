"""`evaluate RUN reward`: the card in JSON and in words."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import RunCli, WriteRecipe, command, recipe_file, write_rows

DISHES = ["soup", "rice", "bread", "cake", "pie", "stew", "toast", "salad", "curry", "pasta", "beans", "eggs"]
COLUMNS = {"prompt": "asked", "completion": "said", "label": "thumb"}


def rows(dishes: list[str], **more: Any) -> list[dict[str, Any]]:
    """Return ratings of three good and three bad answers for each dish."""
    return [
        {"prompt": [{"role": "user", "content": f"Some {dish}."}], "completion": text, "label": label, **more}
        for dish in dishes
        for size in ("Small", "Large", "Huge")
        for text, label in ((f"One {dish}. {size}?", True), (f"No {size}.", False))
    ]


def named(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the column names in COLUMNS."""
    return [{COLUMNS.get(name, name): value for name, value in one.items()} for one in some]


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the read-only folder of a run trained on these ratings, and the ratings themselves."""
    folder = tmp_path_factory.mktemp("trained")
    file = write_rows(folder / "learn.jsonl", named(rows(DISHES)))
    recipe = recipe_file(
        folder,
        tiny_llama,
        small_data,
        data={"source": "jsonl", "path": str(file), "held_out": 0.2, "columns": COLUMNS},
        reward={"loss": "thumbs", "epochs": 8, "batch_size": 8, "learning_rate": 0.01, "max_length": 64},
        rl=None,
    )
    status, written = command("run", recipe, "--out", folder / "out")
    assert status == 0, written
    assert "Not fit for RL" in written  # a dozen held-out answers show nothing
    assert "Too few to tell" in written
    return folder / "out"


def test_columns_are_named_as_in_the_recipe(trained: Path, run_cli: RunCli, tmp_path: Path) -> None:
    """The other tests use the names of the formats. Unusable rows are reported."""
    empty = {"prompt": "?", "completion": "", "label": True}
    file = write_rows(tmp_path / "named.jsonl", named([*rows(DISHES[:4]), empty]))
    status, written = run_cli("evaluate", trained, "reward", "--data", file, "--json", tmp_path / "card.json")
    assert status == 0, written
    assert json.loads((tmp_path / "card.json").read_text())["n"] == 24
    assert "1 row left out; the first" in written


def test_the_card_of_other_data(trained: Path, run_cli: RunCli, tmp_path: Path) -> None:
    others = [f"{kind} {dish}" for kind in ("red", "green", "old") for dish in DISHES]
    mixed = rows(others[:20], source="menu") + rows(others[20:], source="counter")
    file = write_rows(tmp_path / "others.jsonl", mixed)
    status, written = run_cli("evaluate", trained, "reward", "--data", file, "--json", tmp_path / "card.json")
    assert status == 0, written
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["n"], card["up"], card["dialogues"], card["seen_in_training"]) == (216, 108, 36, 0)
    assert {"auroc", "balanced_accuracy", "accuracy", "majority_accuracy", "ece", "pairwise_accuracy"} <= set(card)
    assert {"calibration", "slices", "length", "tfidf_baseline", "mistakes", "verdict", "reliability"} <= set(card)
    assert card["majority_accuracy"] == 0.5
    # TF-IDF separates these perfectly, so nothing can be shown to be better.
    assert card["tfidf_baseline"]["value"] == 1.0
    assert not card["verdict"]["fit"]
    sources = {one["name"]: one["n"] for one in card["slices"] if one["by"] == "source"}
    assert sources == {"menu": 120, "counter": 96}
    for words in ("Not fit for RL", "no better than TF-IDF", "AUROC", "Calibration error", "not compared"):
        assert words in written
    assert len(written.splitlines()) <= 12, written


def test_answers_that_it_learned_from_do_not_count(trained: Path, run_cli: RunCli, tmp_path: Path) -> None:
    file = trained.parent / "learn.jsonl"
    status, _ = run_cli("evaluate", trained, "reward", "--data", file, "--json", tmp_path / "card.json")
    assert status == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["n"] == 72
    assert card["seen_in_training"] == 60
    assert not card["verdict"]["fit"]
    assert "60 of these 72 answers are from dialogues it was trained on" in card["verdict"]["reasons"][0]


def test_answers_that_say_nearly_what_it_learned_from_do_not_count(
    trained: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    """The answers are copies in capitals, in dialogues with new names."""
    copies = [
        {**row, "completion": f"{row['completion'].upper()} !!", "dialogue": f"copy {number}"}
        for number, row in enumerate(rows(DISHES))
    ]
    file = write_rows(tmp_path / "copies.jsonl", copies)
    status, _ = run_cli("evaluate", trained, "reward", "--data", file, "--json", tmp_path / "card.json")
    assert status == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["n"], card["seen_in_training"]) == (72, 60)
    assert "or nearly equal to answers it was trained on" in card["verdict"]["reasons"][0]


def test_one_thumb_down_in_all_is_learned_from_and_judged_less(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    learned = [{**row, "label": number > 0} for number, row in enumerate(rows(DISHES))]
    file = write_rows(tmp_path / "learn.jsonl", learned)
    data = {"source": "jsonl", "path": str(file), "held_out": 0.2}
    status, written = run_cli("run", write_recipe(data=data, rl=None), "--out", tmp_path / "out")
    assert status == 0, written
    assert "no thumbs down are held out: all 1 are in dialogues that are trained on" in written
    assert "AUROC cannot be computed" in written
    card = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["reward"]["eval"]
    assert card["auroc"] is None
    assert "are rated down, and 30 of each label are needed" in card["verdict"]["reasons"][0]


def liked_by_length(count: int, shuffle: bool) -> list[dict[str, Any]]:
    """Return ratings of answers that differ only in length: four in five are up, the longer or (shuffled) any."""
    draw = random.Random(0)
    words = [draw.randrange(1, 13) for _ in range(count)]
    labels = [(length > 2) != (draw.random() < 0.05) for length in words]
    if shuffle:
        draw.shuffle(labels)
    return [
        {
            "prompt": [{"role": "user", "content": f"Number {index // 3}."}],
            "completion": " ".join(["so"] * length),
            "label": label,
        }
        for index, (length, label) in enumerate(zip(words, labels, strict=True))
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shuffled", "no better than chance"),
        ("constant", "no better than chance: AUROC 0.50 (0.50 to 0.50)"),
        ("length", "It only counts length"),
    ],
)
def test_impostors_are_told_from_reward_models(
    name: str, reason: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """The commands train and judge on data where a constant thumb up is right four times in five."""
    file = write_rows(tmp_path / "rated.jsonl", liked_by_length(450, shuffle=name != "length"))
    recipe = write_recipe(
        data={"source": "jsonl", "path": str(file), "held_out": 0.5},
        reward={"loss": "thumbs", "epochs": 4, "batch_size": 16, "learning_rate": 0.01, "max_length": 64},
        rl=None,
    )
    out = tmp_path / "out"
    # Another seed holds out other rows: 95 % intervals let about one impostor in twenty pass.
    code, text = run_cli("run", recipe, "seed=1", "--out", out)
    assert code == 0, text
    if name == "constant":
        weights = out / "reward" / "adapter" / "adapter_model.safetensors"
        tensors = load_file(weights)
        (head,) = [key for key in tensors if "score" in key]
        save_file(tensors | {head: torch.zeros_like(tensors[head])}, weights)
    code, text = run_cli("evaluate", out, "reward", "--json", tmp_path / "card.json")
    assert code == 0, text
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["majority_accuracy"] > 0.75
    assert card["verdict"]["fit"] is False
    assert reason in " ".join(card["verdict"]["reasons"]), card["verdict"]
    assert "Not fit for RL" in text


@pytest.mark.parametrize(("role", "stage"), [("reward", "reward"), ("policy", "rl")])
def test_a_role_that_the_recipe_has_no_section_for(
    role: str, stage: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    recipe = write_recipe(sft={}, reward=None, rl=None)
    (tmp_path / "out" / "recipe.yaml").write_text(Path(recipe).read_text())
    status, written = run_cli("evaluate", tmp_path / "out", role)
    assert status == 2
    assert f"the run has no {role}" in written
    assert f"Its recipe has no section {stage}; it has sft." in written
