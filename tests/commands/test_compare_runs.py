"""`compare-runs A B`: both models of two runs on the rows that both hold out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from perl.data.records import Turn
from perl.measure.rated_rows import RatedRows
from perl.measure.two_runs import compare_metrics, compare_scores
from tests.conftest import RunCli, WriteRecipe, write_rows

DISHES = ["soup", "rice", "bread", "cake", "pie", "stew", "toast", "salad", "curry", "pasta", "beans", "eggs"]


def rated(dishes: list[str]) -> list[dict[str, Any]]:
    """Return a good and a bad answer for each dish, with swapped labels for every third."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Some {dish}."}],
            "completion": text,
            "label": good ^ (n % 3 == 0),
        }
        for n, dish in enumerate(dishes)
        for text, good in ((f"One {dish}. Large?", True), ("No.", False))
    ]


def test_two_runs_of_all_kinds(write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path) -> None:
    """Results equal those in the reports; differences of the recipes are shown; `report` refuses these runs."""
    dishes = [f"{size} {dish}" for size in ("big", "old") for dish in DISHES]
    file = write_rows(tmp_path / "rated.jsonl", rated(dishes))
    recipe = write_recipe(
        data={"source": "jsonl", "path": str(file), "held_out": 0.5},
        reward={"loss": "thumbs", "epochs": 1, "batch_size": 8, "max_length": 64},
        rl={
            "steps": 1,
            "prompts_per_step": 2,
            "max_new_tokens": 4,
            "eval_prompts": 16,
            "eval_samples": None,
            "learning_rate": 0.05,
        },
    )
    folders = [tmp_path / "A", tmp_path / "B"]
    for folder, override in zip(folders, ([], ["reward.epochs=3", "reward.learning_rate=0.02"]), strict=True):
        status, written = run_cli("run", recipe, *override, "--out", folder)
        assert status == 0, written
    status, written = run_cli("compare-runs", *folders, "--json", tmp_path / "found.json")
    assert status == 0, written
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["recipes"] == {"reward.epochs": [1, 3], "reward.learning_rate": ["auto", 0.02]}
    assert found["same_reward"] is False
    reports = [json.loads((folder / "report.json").read_text())["stages"] for folder in folders]
    reward = {one["metric"]: one for one in found["reward"]["differences"]}
    policy = {one["metric"]: one for one in found["policy"]["differences"]}
    for report, end, name in zip(reports, ("first", "second"), "AB", strict=True):
        assert reward["AUROC"][end] == pytest.approx(report["reward"]["eval"]["auroc"])
        assert policy[f"reward of {name}"][end] == pytest.approx(report["rl"]["eval"]["reward_after"], rel=0.02)
        assert policy["kl"][end] == pytest.approx(report["rl"]["eval"]["kl"], abs=1e-3)
    assert "B - A" in written
    status, _ = run_cli("compare-runs", folders[0], folders[0], "--json", tmp_path / "itself.json")
    itself = json.loads((tmp_path / "itself.json").read_text())["policy"]["differences"]
    expected = pytest.approx(reports[0]["rl"]["eval"]["reward_after"], abs=1e-5)
    assert [one["first"] for one in itself if one["metric"].startswith("reward")] == [expected]
    assert "each reward scores the completions of both" in written
    status, written = run_cli("report", *folders)
    assert status == 2
    assert "which differ in reward.epochs and reward.learning_rate" in written
    assert f"perl-rlhf compare-runs {folders[0]} {folders[1]}" in " ".join(written.split())


def test_runs_that_hold_out_other_rows(write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rated.jsonl", rated(DISHES))
    data = {"source": "jsonl", "path": str(file), "held_out": 0.2}
    for seed in (0, 1):
        assert (
            run_cli("run", write_recipe(data=data, rl=None), f"seed={seed}", "--out", tmp_path / str(seed))[0] == 0
        )
    status, written = run_cli("compare-runs", tmp_path / "0", tmp_path / "1")
    assert status == 2
    assert "both hold out too few rows in common" in written
    assert "10 are needed" in written
    assert "the same data.eval_path" in written


def test_runs_with_nothing_in_common(write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "recipe.yaml").write_text(write_recipe(rl=None).read_text())
    status, written = run_cli("compare-runs", tmp_path / "A", tmp_path / "A")
    assert status == 2
    assert "neither a finished reward model nor a finished policy in common" in written


def rows(labels: list[bool]) -> RatedRows:
    """Return rated answers, four per dialogue."""
    context = (Turn("user", "?"),)
    answers = [Turn("agent", str(number)) for number in range(len(labels))]
    dialogues = [str(number // 4) for number in range(len(labels))]
    return RatedRows([context] * len(labels), answers, dialogues, ["made"] * len(labels), labels, None, [])


def test_a_difference_is_found_where_there_is_one_and_only_there() -> None:
    """Informative scores are compared with nearly uninformative ones, and with a copy that has other noise."""
    draw = np.random.default_rng(0)
    labels = [bool(one) for one in draw.integers(0, 2, 400)]
    truth = np.array(labels, dtype=float)
    good, alike, poor = (truth * size + draw.normal(size=400) for size in (2.0, 2.0, 0.3))
    found = compare_scores(poor.tolist(), good.tolist(), rows(labels)).differences[0]
    assert (found.metric, found.higher) == ("AUROC", 2)
    assert found.first == pytest.approx(roc_auc_score(labels, poor))
    assert found.second == pytest.approx(roc_auc_score(labels, good))
    assert compare_scores(alike.tolist(), good.tolist(), rows(labels)).differences[0].higher == 0
    itself = compare_scores(good.tolist(), good.tolist(), rows(labels))
    assert itself.agreement == 1.0
    assert itself.differences[0].interval == (0.0, 0.0)


def test_pairs_alone_have_no_metric_of_single_answers() -> None:
    context = (Turn("user", "?"),)
    compared = RatedRows(
        [context] * 4, [Turn("agent", t) for t in "abcd"], list("1212"), ["made"] * 4, [True, True, False, False],
        None, [(0, 2), (1, 3)],
    )  # fmt: skip
    found = compare_scores([2.0, 1.0, 1.0, 2.0], [4.0, 3.0, 1.0, 2.0], compared)
    ((metric, one, other),) = [(one.metric, one.first, one.second) for one in found.differences]
    assert (metric, one, other) == ("pairwise accuracy", 0.5, 1.0)
    assert found.agreement == 0.5


def test_policies_are_compared_by_prompt() -> None:
    """An equal gain on every prompt has no spread, however much the prompts differ."""
    first = {"reward": [0.0, 1.0, 5.0, 2.0], "gold": [0.0] * 4}
    second = {"reward": [0.5, 1.5, 5.5, 2.5]}
    (found,) = compare_metrics(first, second, list("abcd")).differences
    assert (found.metric, found.first, found.second, found.higher) == ("reward", 2.0, 2.5, 2)
    assert found.interval == pytest.approx((0.5, 0.5))


def test_the_reference_is_the_adapter_that_rl_started_from(
    write_recipe: WriteRecipe, run_cli: RunCli, small_data: Path, tmp_path: Path
) -> None:
    taught = write_recipe(
        data={"source": "jsonl", "path": str(small_data / "demonstrations.jsonl"), "held_out": 0.3},
        sft={"epochs": 30, "batch_size": 4, "learning_rate": 0.05},
        reward=None,
        rl=None,
    )
    status, written = run_cli("run", taught, "--out", tmp_path / "taught")
    assert status == 0, written
    rl = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 8, "learning_rate": 1e-6}
    rl |= {"reward": {"function": "rewards.py:length"}}
    rl |= {"adapter": str(tmp_path / "taught" / "sft" / "adapter")}
    asked = [{"prompt": f"Some {size} {dish}."} for size in ("big", "old") for dish in DISHES]
    prompts = {"source": "jsonl", "path": str(write_rows(tmp_path / "prompts.jsonl", asked)), "held_out": 0.5}
    recipe = write_recipe(data=prompts, reward=None, rl=rl)
    status, written = run_cli("run", recipe, "--out", tmp_path / "A")
    assert status == 0, written
    status, written = run_cli("compare-runs", tmp_path / "A", tmp_path / "A", "--json", tmp_path / "found.json")
    assert status == 0, written
    differences = json.loads((tmp_path / "found.json").read_text())["policy"]["differences"]
    assert [one["first"] for one in differences if one["metric"] == "kl"] == [pytest.approx(0, abs=1e-3)]


def test_patterns_and_folders_in_brackets_are_no_markup(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"On day {number}"} for number in range(24)])
    rl = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 2, "eval_prompts": 12}
    recipe = write_recipe(data={"path": str(file), "held_out": 0.5}, reward=None, rl=rl)
    folders, dates = [tmp_path / name for name in ("[/a]", "[/b]")], (r"\d+[/-]\d+", "[a-z]+[/-]")
    for folder, pattern in zip(folders, dates, strict=True):
        reward = f"rl.reward={{kind: regex, pattern: '{pattern}'}}"
        more = () if folder is folders[0] else ("--from", folders[0])
        status, written = run_cli("run", recipe, reward, "--out", folder, *more)
        assert status == 0, written
        assert f"Written: {folder}/report.html" in written
    assert f"rl.reward.pattern was {json.dumps(dates[0])} and is {json.dumps(dates[1])}" in written
    status, written = run_cli("compare-runs", *folders)
    assert status == 0, written
    assert all(pattern in written for pattern in dates)
    status, written = run_cli("evaluate", folders[0], "policy")
    assert status == 0, written
    assert "[/a]" in " ".join(written.split())
