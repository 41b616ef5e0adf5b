"""Plugins: imported before the recipe is checked, part of its hash, and found by every command."""

import json
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from perl import plugins
from perl.errors import UserError
from perl.recipe import load_recipe
from perl.rl.rewards import REWARDS
from perl.stages.identity import settings_sha256
from tests.conftest import RunCli

PROJECT = Path(__file__).parent.parent
EXAMPLE = PROJECT / "tests" / "rl" / "rewards" / "example_reward.yaml"
SMALL = ["rl.steps=2", "rl.prompts_per_step=2", "rl.max_new_tokens=8", "rl.eval_prompts=2"]
PLUGIN = """
from perl.rl.rewards import REWARDS, RewardPart
class Part(RewardPart):
    {setting}: float = 1.0
REWARDS["{name}"] = Part
"""


pytestmark = pytest.mark.usefixtures("own_registries")


def write(folder: Path, *names: str, kind: str = "mine", **settings: object) -> Path:
    """Write a recipe with these plugins and a reward of a kind with these settings."""
    content = {
        "name": "x",
        "plugins": list(names),
        "base": {"model": "org/model"},
        "rl": {"reward": [{"kind": kind, **settings}]},
    }
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def plugin(file: Path, name: str = "mine", setting: str = "low") -> Path:
    file.write_text(PLUGIN.format(name=name, setting=setting))
    return file


def forget(name: str) -> None:
    """Forget the plugin, as a new process does."""
    plugins._loaded.clear()
    REWARDS.pop(name, None)


def test_the_example_runs_resumes_and_is_found_again(
    tiny_llama: Path, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(EXAMPLE.with_suffix(".py").read_text().splitlines()) <= 40
    out = tmp_path / "out"
    arguments = ("run", EXAMPLE, f"base.model={tiny_llama}", *SMALL, "--out", out)
    code, text = run_cli(*arguments)
    assert code == 0, text
    evaluated = json.loads((out / "report.json").read_text())["stages"]["rl"]["eval"]
    assert evaluated["reward_parts_after"].keys() == {"animals", "keywords", "length"}
    monkeypatch.chdir(tmp_path)  # nothing is found from here by a relative path
    others = [("report", out), ("evaluate", out, "policy"), ("export", out, "policy", "exported")]
    for command in (arguments, *others):
        forget("keywords")
        code, text = run_cli(*command)
        assert code == 0, text
        assert command[0] != "evaluate" or "reward/keywords" in text
    assert load_recipe(out / "recipe.yaml").plugins == [str(EXAMPLE.with_suffix(".py"))]


def test_a_plugin_is_imported_once(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("with open(__file__.removesuffix('py') + 'log', 'a') as log:\n    log.write('.')\n")
    recipe = write(tmp_path, "own.py", "own.py", kind="length")
    for _ in range(2):
        load_recipe(recipe)
    assert file.with_suffix(".log").read_text() == "."


def test_the_hash_is_of_the_plugins_bytes_wherever_they_lie(tmp_path: Path) -> None:
    def hashed(setting: str, text: str) -> str:
        (tmp_path / "own.py").write_text(text)
        return settings_sha256(load_recipe(write(tmp_path, "own.py", kind="length")), "rl")

    first = hashed("low", "LOW = 1")
    assert hashed("low", "LOW = 2") != first
    assert hashed("low", "LOW = 1") == first
    moved = write(tmp_path / "elsewhere", "own.py", kind="length")
    (moved.parent / "own.py").write_text("LOW = 1")
    assert settings_sha256(load_recipe(moved), "rl") == first


def test_a_changed_plugin_is_imported_again_in_place_of_what_it_was(tmp_path: Path) -> None:
    recipe, file = write(tmp_path, "own.py", low=2.0), tmp_path / "own.py"
    plugin(file)
    load_recipe(recipe)
    plugin(file, setting="high")
    with pytest.raises(UserError, match=r"rl\.reward\.0\.low: unknown key"):
        load_recipe(recipe)
    assert load_recipe(recipe, ["rl.reward=[{kind: mine, high: 3}]"]).rl
    plugin(file, name="other")
    with pytest.raises(UserError, match="no kind of reward 'mine'"):
        load_recipe(recipe)


def test_a_recipe_can_be_sent_to_another_process(tmp_path: Path) -> None:
    plugin(tmp_path / "own.py")
    recipe = load_recipe(write(tmp_path, "own.py", low=2.0))
    sent = pickle.dumps(recipe)
    forget("mine")
    assert pickle.loads(sent).model_dump() == recipe.model_dump()


def test_a_validator_without_a_remedy_is_explained_too(tmp_path: Path) -> None:
    text = PLUGIN.format(name="mine", setting="low").replace(
        "REWARDS[",
        "    @__import__('pydantic').field_validator('low')\n"
        "    def _check(cls, low):\n        raise ValueError('Too low')\nREWARDS[",
    )
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, "own.py", low=2))
    assert str(caught.value).endswith("rl.reward.0.low: too low\n  The default is 1.0.")


def test_a_run_of_another_version_of_a_plugin_is_refused(
    tiny_llama: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    """The run's results do not come from this version."""
    for file in (EXAMPLE.with_suffix(".py"), EXAMPLE):
        (tmp_path / file.name).write_text(file.read_text().replace("../../../", f"{PROJECT}/"))
    out = tmp_path / "out"
    code, text = run_cli("run", tmp_path / EXAMPLE.name, f"base.model={tiny_llama}", *SMALL, "--out", out)
    assert code == 0, text
    with open(tmp_path / "example_reward.py", "a") as file:
        file.write("# changed\n")
    code, text = run_cli("evaluate", out, "policy")
    assert code == 2
    assert "since rl was trained here, the file of plugins has changed" in " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\ny = (\n", "own.py:2: cannot be imported: SyntaxError"),
        ("x = 1\n\nx / 0\n", "own.py:3: cannot be imported: ZeroDivisionError: division by zero"),
        ("def f():\n    return absent\nf()\n", "own.py:2: cannot be imported: NameError"),
        ("import json\n\njson.loads('x')\n", "own.py:3: cannot be imported: JSONDecodeError"),
        ("import sys\nsys.exit(3)\n", "own.py:2: cannot be imported: SystemExit: 3"),
        (PLUGIN.format(name="model", setting="x"), "'model' in REWARDS is taken by a built-in"),
        (PLUGIN.format(name="theirs", setting="x"), "'theirs' in REWARDS is taken by"),
        ("from perl.rl.rewards import REWARDS\ndel REWARDS['length']", "'length' in REWARDS is taken"),
        ("from perl.rl.rewards import REWARDS\nREWARDS['mine'] = 3", "no kind of reward 'mine'"),
    ],
)
def test_a_plugin_that_cannot_be_used_leaves_the_registries_as_they_were(
    text: str, says: str, tmp_path: Path
) -> None:
    plugin(tmp_path / "first.py", name="theirs")
    (tmp_path / "own.py").write_text(text)
    recipe, before = write(tmp_path, "first.py", "own.py"), dict(REWARDS)
    with pytest.raises(UserError) as caught:
        load_recipe(recipe)
    assert says in str(caught.value)
    assert before.items() <= REWARDS.items()


def test_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        plugin(tmp_path / folder / "own.py", name=f"of_{folder}")
    load_recipe(write(tmp_path, "a/own.py", "b/own.py", kind="of_b"))
    assert REWARDS["of_a"].__module__ != REWARDS["of_b"].__module__


@pytest.mark.parametrize("name", plugins.REGISTRIES)
def test_registries_are_where_they_are_said_to_be(name: str) -> None:
    assert isinstance(getattr(import_module(plugins.REGISTRIES[name]), name), dict)


def test_a_recipe_without_plugins_is_read_without_torch(tmp_path: Path) -> None:
    recipe = write(tmp_path, kind="length", target=3)
    code = (
        "import sys; from perl.recipe import load_recipe; import perl.rl.rewards; "
        f"load_recipe({str(recipe)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
