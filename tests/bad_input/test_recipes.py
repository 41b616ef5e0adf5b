"""Recipes and arguments that cannot be used."""

from datetime import date
from pathlib import Path

import pytest

from tests.bad_input.cases import Case, named
from tests.bad_input.conftest import Refused, RefusedIn
from tests.conftest import RunCli, WriteRecipe

CASES = [
    Case("not UTF-8", ("cannot be read", "0xff", "YAML file in UTF-8"), recipe=b"name: \xff"),
    Case("broken YAML", ("not valid YAML", "line 1", "Fix this line"), recipe=b"name: [tiny"),
    Case("wrong tag", ("'x' is not a valid timestamp", "line 1", "Fix this line"), recipe=b"name: !!timestamp x"),
    Case("no mapping", ("is a mapping", "recipe.yaml", "quickstart.yaml"), recipe=b"- name: tiny"),
    Case("empty recipe", ("is a mapping", "recipe.yaml", "quickstart.yaml"), recipe=b""),
    Case("an alias", ("alias *a", "line 2", "write it out"), recipe=b"name: &a x\nbase: {model: *a}"),
    Case(
        "an alias that contains itself",
        ("alias *a", "line 2", "write it out"),
        recipe=b"name: x\nbase: {config: &a {model_type: llama, x: *a}, random_init: true}\nreward: {}\n",
    ),
    Case("Python in it", ("python/object", "line 1", "Fix"), recipe=b"name: !!python/object/apply:os.getcwd []"),
    Case("nested too deeply", ("nested too deeply", "recipe.yaml", "Fix this line"), recipe=b"[" * 2000),
    Case("UTF-16", ("cannot be read", "0xff", "YAML file in UTF-8"), recipe="name: x".encode("utf-16")),
    Case("key twice", ("key 'name' twice", "line 1", "Fix this line"), recipe=b"name: a\nname: b\n"),
    Case("no base", ("missing", "recipe.yaml: base", "Add this key"), changes={"base": None}),
    Case("no stage", ("no stage to run", "recipe.yaml", "Add a section"), changes={"reward": None, "rl": None}),
    Case(
        "unknown key",
        ("unknown key", "recipe.yaml: rl.kl_coeff", "Did you mean rl.kl_coef?"),
        overrides=("rl.kl_coeff=0.1",),
    ),
    Case("unknown section", ("unknown key", "rewards", "Did you mean reward?"), overrides=("rewards.epochs=1",)),
    Case("unlike any key", ("unknown key", "lora.xyzzy", "Valid keys: rank"), overrides=("lora.xyzzy=1",)),
    Case("zero steps", ("greater than 0", "the value is 0", "The default is 100"), overrides=("rl.steps=0",)),
    Case(
        "negative rate",
        ("greater than 0", "reward.learning_rate", "The default is auto"),
        overrides=("reward.learning_rate=-1",),
    ),
    Case("all held out", ("less than 1", "data.held_out", "the value is 1.0"), overrides=("data.held_out=1.0",)),
    Case("not a number", ("valid integer", "lora.rank", "'eight'"), overrides=("lora.rank=eight",)),
    Case(
        "no such algorithm",
        ("should be 'reinforce', 'ppo', ", "rl.algorithm", "'sarsa'"),
        overrides=("rl.algorithm=sarsa",),
    ),
    Case(
        "rloo of one",
        ("samples_per_prompt", "rl", "at least 2"),
        overrides=("rl.algorithm=rloo", "rl.samples_per_prompt=1"),
    ),
    Case(
        "one completion per step",
        ("no other to be compared with", "rl", "Raise prompts_per_step"),
        overrides=("rl.prompts_per_step=1",),
    ),
    Case("name is a path", ("match pattern", "'../x'", "quickstart.yaml shows"), overrides=("name=../x",)),
    Case("no KEY=VALUE", ("is not KEY=VALUE", "'rl.steps'", "For example"), overrides=("rl.steps",)),
    Case("override no YAML", ("not valid YAML", "'[1'", "Quote it"), overrides=("lora.layers=[1",)),
    Case("key twice in a value", ("key 'rank' twice", "lora", "Quote it"), overrides=("lora={rank: 1, rank: 2}",)),
    Case(
        "trust without a model",
        ("for the code of a model", "base", "leave it out"),
        changes={"base": {"build": {}, "trust_remote_code": True}},
    ),
    Case(
        "no JSON in base.config",
        ("not a valid JSON value", "base.config", "quickstart.yaml shows"),
        changes={"base": {"config": {"model_type": "llama", "x": date(2026, 1, 1)}, "random_init": True}},
    ),
    Case("into a value", ("rank is a value", "lora.rank.x=1", "Check the key"), overrides=("lora.rank.x=1",)),
    Case("no section", ("no section sft", "sft.epochs=2", "Add `sft: {}`"), overrides=("sft.epochs=2",)),
    Case("stage not in recipe", ("no section sft", "tiny", "Add it"), command="sft"),
    Case(
        "no such plugin",
        ("no such Python file", "plugins.0", "path of a Python"),
        overrides=("plugins=[gone.py]",),
    ),
    Case("a broken plugin", ("SyntaxError", "bad.py:1", "Fix the file"), overrides=("plugins=[bad.py]",)),
    Case(
        "a plugin that is data",
        ("no such Python file", "recipe.yaml", "Python"),
        overrides=("plugins=[recipe.yaml]",),
    ),
    Case("a path for plugins", ("valid list", "plugins", "The default is []"), overrides=("plugins=own.py",)),
    Case(
        "a number among plugins",
        ("valid string", "plugins.1", "the value is 3"),
        overrides=("plugins=[own.py, 3]",),
    ),
    Case(
        "a plugin that takes a name",
        ("'length' in REWARDS is taken by a built-in", "takes.py", "another name"),
        overrides=("plugins=[takes.py]",),
    ),
    Case("no rewards", ("an empty list", "rl.reward", "leave the key out"), overrides=("rl.reward=[]",)),
    Case(
        "no such kind of reward",
        ("no kind of reward 'lenght'", "rl.reward.1.kind", "Did you mean length?"),
        overrides=("rl.reward=[{kind: model}, {kind: lenght}]",),
    ),
    Case(
        "a reward of weight 0",
        ("weight 0", "rl.reward.1.weight", "leave the part out"),
        overrides=("rl.reward=[{kind: model}, {kind: length, weight: 0}]",),
    ),
    Case(
        "a reward of infinite weight",
        ("the value is inf", "rl.reward.0.weight", "The default is 1.0"),
        overrides=("rl.reward=[{kind: model, weight: .inf}]",),
    ),
    Case(
        "unknown setting of a reward",
        ("unknown key", "rl.reward.0.taget", "Did you mean rl.reward.0.target?"),
        overrides=("rl.reward=[{kind: length, taget: 3}]",),
    ),
    Case(
        "a function that is missing among rewards",
        ("no such Python file", "gone.py:f", "Give FILE.py:NAME"),
        overrides=("rl.reward=[{kind: length}, {kind: function, function: 'gone.py:f'}]",),
    ),
    Case("a word for a reward", ("section with keys", "rl.reward.0", "'model'"), overrides=("rl.reward=[model]",)),
    Case(
        "an item that is not there",
        ("reward has no item 1", "rl.reward.1.weight=2", "counted from 0"),
        changes={"rl": {"reward": [{"kind": "model"}]}},
        overrides=("rl.reward.1.weight=2",),
    ),
    Case(
        "stage too early",
        ("needs the adapter of reward", "reward", "perl-rlhf reward"),
        command="rl",
        overrides=("rl.reward={}",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_one_message_and_nothing_lost(case: Case, refused: Refused) -> None:
    refused(case)


def test_no_such_recipe(refused_in: RefusedIn, tmp_path: Path) -> None:
    refused_in(("no such recipe", "gone.yaml", "Check the path"), "run", tmp_path / "gone.yaml")


def test_a_folder_in_place_of_a_recipe(refused_in: RefusedIn, tmp_path: Path) -> None:
    refused_in(("cannot be read", str(tmp_path), "A recipe is a YAML file"), "run", tmp_path)


FAILING = """
import sys
def short(completions, **columns):
    return [0.0]
def nan(completions, **columns):
    return [float("nan") for _ in completions]
def none(completions, **columns):
    return [0.5, None, *[0.5 for _ in completions[2:]]]
def string(completions, **columns):
    return ["0.5" for _ in completions]
def text(completions, **columns):
    return "0" * len(completions)
def mapping(completions, **columns):
    return dict.fromkeys(range(len(completions)), 1.0)
def huge(completions, **columns):
    return [0.0, -1e200, *[0.0 for _ in completions[2:]]]
def endless(completions, **columns):
    return [10**400 for _ in completions]
def raises(completions, **columns):
    raise KeyError("colour")
def leaves(completions, **columns):
    sys.exit(3)
def few(completions):
    return [0.0 for _ in completions]
def more(completions, colour, **columns):
    return [0.0 for _ in completions]
"""


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("short", "own.py:short: the reward function must return 32 finite numbers, one per completion; "),
        ("short", "it returned 1 of 32: [0.0]"),
        ("nan", "score 0 is nan"),
        ("none", "score 1 is None, for '"),
        ("string", "score 0 is '0.5'"),
        ("text", "it returned str '0000"),
        ("mapping", "it returned dict {0: 1.0, 1: 1.0, "),
        (
            "huge",
            "score 1 of the reward function is -1e+200; its absolute value may be at most 1e+30",
        ),
        ("endless", "score 0 is 1000"),
        ("raises", "the reward function failed: KeyError: 'colour'"),
        ("leaves", "the reward function failed: SystemExit: 3"),
        ("few", "own.py:few: the reward function cannot be called with prompts, completions, completion_ids: "),
        ("few", "accept prompts, completions, completion_ids and **kwargs"),
        ("more", "missing a required"),
        ("none", "Where TRL's functions return None, return 0"),
    ],
)
def test_a_reward_function_that_fails_is_named(
    function: str, says: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(FAILING)
    recipe, out = write_recipe(reward=None), tmp_path / "out"
    status, written = run_cli("run", recipe, f"rl.reward.function=own.py:{function}", "--out", out)
    assert status == 2
    assert says in written
    assert "own.py" in written
    assert "Traceback" not in written
    assert not list(out.glob("**/adapter"))
    assert {file.name for file in (out / "policy").glob("*")} <= {"identity.json"}


def test_a_corrected_reward_function_goes_on_in_the_same_folder(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    own = "def own(completions, **columns):\n    return [{} for text in completions]\n"
    (tmp_path / "own.py").write_text(own.format("None"))
    recipe, out = (
        write_recipe(reward=None, rl={"steps": 1, "prompts_per_step": 2, "max_new_tokens": 2}),
        tmp_path / "out",
    )
    command = ("run", recipe, "rl.reward.function=own.py:own", "--out", out)
    assert run_cli(*command)[0] == 2
    (tmp_path / "own.py").write_text(own.format("float(len(text))"))
    status, written = run_cli(*command)
    assert status == 0, written


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("evaluate", "gone", "reward"), ("not a run folder", "gone", "--out")),
        (("evaluate", "gone", "critic"), ("no role 'critic'", "ROLE", "reward or policy")),
        (("chat", "gone"), ("not a run folder", "gone", "--out")),
        (("report", "gone"), ("not a run", "gone", "perl-rlhf run")),
        (("data", "check", "cofee-simulator"), ("no source", "data.source", "coffee-simulator?")),
        (("data", "check", "gone.jsonl"), ("no such file", "gone.jsonl", "Check data.path")),
        (("data", "check", "jsonl:"), ("has no path", "'jsonl:'", "jsonl:PATH")),
        (("data", "fetch", "taskmaster-cofee"), ("no source", "data.source", "mean taskmaster-coffee?")),
        (("data", "fetch", "jsonl"), ("nothing to fetch", "'jsonl'", "taskmaster-coffee")),
    ],
)
def test_other_commands_refuse_in_the_same_way(
    command: tuple[str, ...],
    says: tuple[str, ...],
    refused_in: RefusedIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused_in(says, *command)
