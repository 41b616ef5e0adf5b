"""Rules as rewards, and the recipe that trains on them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from perl.data.records import Prompt, Turn
from perl.errors import UserError
from perl.rl.rewards.rules import JsonSchema, Math, Regex
from perl.rl.samplers.base import Samples
from tests.conftest import RunCli, WriteRecipe, write_rows

SAMPLES = cast(Samples, SimpleNamespace())
SCHEMA = {"type": "object", "required": ["size"], "properties": {"size": {"enum": ["small", "large"]}}}


def test_math_compares_each_completion_with_its_prompts_column() -> None:
    prompts = [Prompt((Turn("user", "?"),), "?", {"result": value}) for value in ("2", "3.0", "4")]
    texts = ["1 + 1 = 2", "3", "5"]
    assert Math("number", "result", prompts)(prompts, SAMPLES, texts) == [1, 1, 0]


def test_a_pattern_is_found_anywhere() -> None:
    assert Regex(r"\bsize\b")([], SAMPLES, ["What size?", "sizes", ""]) == [1, 0, 0]


def test_json_is_checked_by_the_schema() -> None:
    texts = ['{"size": "small"}', '{"size": "huge"}', "{}", '{"size": "small"', '{"size": NaN}', "[]"]
    assert JsonSchema(SCHEMA)([], SAMPLES, texts) == [1, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="is not a JSON schema"):
        JsonSchema({"type": "colour"})
    deep = "[" * 400 + "]" * 400
    assert JsonSchema({"items": {"$ref": "#"}})([], SAMPLES, ["[[]]", deep]) == [1, 0]


def rules_recipe(write_recipe: WriteRecipe, tmp_path: Path, rows: list[dict[str, Any]], reward: object) -> Path:
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    return write_recipe(
        data={"source": "jsonl", "path": str(file), "held_out": 0.5},
        reward=None,
        rl={
            "reward": reward,
            "algorithm": "grpo",
            "steps": 1,
            "prompts_per_step": 2,
            "max_new_tokens": 4,
            "eval_prompts": 3,
            "eval_samples": 5,
        },
    )


def test_pass_at_k_is_the_policys_and_shown(write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path) -> None:
    """There are two rules: a completion is right if it satisfies both; the length is not a rule."""
    rows = [{"prompt": f"Number {n} is", "answer": n} for n in range(8)]
    reward = [
        {"kind": "regex", "pattern": "[aeiou]"},
        {"kind": "regex", "pattern": "[bcdfg]", "weight": 0.5},
        {"kind": "length", "weight": -0.1},
    ]
    recipe, out = rules_recipe(write_recipe, tmp_path, rows, reward), tmp_path / "out"
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    found = json.loads((out / "report.json").read_text())["stages"]["rl"]["eval"]
    assert found["samples_per_prompt"] == 5
    assert [one["k"] for one in found["pass_at"]] == [1, 2, 4]
    for when in ("before", "after"):
        parts = found[f"reward_parts_{when}"]
        values = [one[when] for one in found["pass_at"]]
        assert found[f"pass_at_1_{when}"] == values[0]
        assert max(0, parts["regex"] + parts["regex_2"] - 1) <= values[0] + 1e-9
        assert values[0] <= min(parts["regex"], parts["regex_2"]) + 1e-9
        assert values == sorted(values)
        low, high = found["pass_at"][0][f"{when}_interval"]
        assert low <= values[0] <= high
    assert "pass@4" in text
    assert "pass@4" in (out / "report.html").read_text(encoding="utf-8")
    code, text = run_cli("evaluate", out, "policy", "--json", tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["pass_at"] == found["pass_at"]
    assert "pass@4" in text


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ([{"kind": "math", "column": "result"}], "it has no column 'result'"),
        ([{"kind": "math", "answer": "word"}], "rl.reward"),
        ([{"kind": "regex", "pattern": "("}], "is not a regular expression"),
        ([{"kind": "json_schema", "json_schema": {"type": "colour"}}], "is not a JSON schema"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused_before_training(
    reward: object, says: str, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Number {n} is", "answer": n} for n in range(4)]
    code, text = run_cli("run", rules_recipe(write_recipe, tmp_path, rows, reward), "--out", tmp_path / "out")
    assert code == 2
    assert says in text
    assert not (tmp_path / "out" / "policy").exists()
