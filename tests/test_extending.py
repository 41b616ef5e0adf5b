"""The examples of docs/extending.md: complete, short, and run from the command line as printed there."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from perl import plugins
from perl.plugins import REGISTRIES
from tests.conftest import RunCli, WriteRecipe

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
LONGEST = 40
RL: dict[str, Any] = {
    "reward": {"function": "rewards.py:length"},
    "steps": 1,
    "prompts_per_step": 2,
    "max_new_tokens": 4,
    "eval_prompts": 2,
}


class Example(NamedTuple):
    title: str
    keys: dict[str, Any]
    """The recipe's section."""
    code: str


def examples() -> list[Example]:
    pattern = r"^## ([^\n]+)\n.*?```yaml\n(.*?)```.*?```python\n(.*?)```"
    found = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Example(title, yaml.safe_load(keys), code) for title, keys, code in found]


pytestmark = pytest.mark.usefixtures("own_registries")
EXAMPLES = {example.title: example for example in examples()}


def test_there_is_an_example_for_each_registry() -> None:
    added = re.findall(r"^([A-Z]+)\[", "".join(example.code for example in EXAMPLES.values()), re.MULTILINE)
    assert sorted(added) == sorted(REGISTRIES)


def test_the_page_shows_the_files_that_other_tests_use() -> None:
    files = [file.read_text(encoding="utf-8") for file in Path(__file__).parent.rglob("example_*.py")]
    assert sorted(files) == sorted(example.code for example in EXAMPLES.values())


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_short(title: str) -> None:
    assert len(EXAMPLES[title].code.splitlines()) <= LONGEST


@pytest.mark.parametrize("title", [title for title in EXAMPLES if title != "A family of models"])
def test_an_example_runs_as_it_is_written(
    title: str, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    example = EXAMPLES[title]
    (tmp_path / example.keys["plugins"][0]).write_text(example.code)
    rows = [
        f"Which drink is number {number}?,A {name}.,{1 + number % 5}" for number, name in enumerate("abcdefghij")
    ]
    (tmp_path / "answers.csv").write_text("\n".join(["question,answer,stars", *rows]))
    changes = {**example.keys, "rl": RL | example.keys.get("rl", {}), "reward": None}
    changes |= {"lora": None} if "adapter" in changes else {}
    status, said = run_cli("run", write_recipe(**changes), "--out", tmp_path / "out")
    assert status == 0, said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    assert report["stages"]["rl"]["eval"]["steps"] == RL["steps"]


def test_a_family_of_models_trains_a_reward_model(
    write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path, tiny_llama: Path
) -> None:
    """The example's model cannot generate, so its recipe has no RL."""
    example = EXAMPLES["A family of models"]
    plugin = tmp_path / example.keys["plugins"][0]
    plugin.write_text(example.code)
    plugins.load_plugins([str(plugin)], "plugins")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("sums"))
    model.save_pretrained(tmp_path / "my-model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "my-model")
    recipe = write_recipe(**example.keys, rl=None)
    status, said = run_cli("run", recipe, "--out", tmp_path / "out")
    assert status == 0, said
    status, said = run_cli("run", write_recipe(**example.keys, reward=None), "--out", tmp_path / "rl")
    assert status == 2
    assert "it has no KV cache" in " ".join(said.split())
