"""Input that cannot be used: exit status 2 and one message that names cause, place or value, and remedy."""

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from tests.conftest import RunCli, WriteRecipe, write_rows

LONG = "please " * 400


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True)
class Case:
    """What is wrong, and phrases that the message has to hold: cause, place or value, remedy."""

    name: str
    says: tuple[str, str, str]
    command: str = "run"
    changes: dict[str, Any] = field(default_factory=dict)
    """Sections of the recipe that replace those of a good one; None takes one out."""
    overrides: tuple[str, ...] = ()
    recipe: bytes | None = None
    """The recipe file as it stands."""
    rows: list[Any] | bytes | None = None
    """The data file."""
    spoil: Callable[[Path], None] | None = None
    """Called with a copy of the good model's folder, which is then the base."""
    out: Callable[[Path], None] | None = None
    """Called with the path of the run folder, to put something there."""


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return spoil


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_the_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def pickled_weights(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def masked_lm(folder: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    no_weights(folder)
    BertModel(config).save_pretrained(folder)


def longer_layers(folder: Path) -> None:
    edit_json("config.json", intermediate_size=80)(folder)


def another_recipe(out: Path) -> None:
    out.mkdir()
    text = (out.parent / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | {"seed": 7}))


def broken_recipe(out: Path) -> None:
    out.mkdir()
    (out / "recipe.yaml").write_text("name: [")


def broken_result(out: Path) -> None:
    (out / "policy").mkdir(parents=True)
    (out / "policy" / "result.json").write_text("{")


REWARDS = """
def right(completions, **columns):
    return [0.0 for _ in completions]
def short(completions, **columns):
    return [0.0]
def nan(completions, **columns):
    return [float("nan") for _ in completions]
def raises(completions, **columns):
    raise KeyError("colour")
number = 3
"""

RECIPES = [
    Case("no such recipe", ("no such recipe", "recipe.yaml", "Check the path"), recipe=b"\0"),
    Case("not UTF-8", ("cannot be read", "0xff", "YAML file in UTF-8"), recipe=b"name: \xff"),
    Case("broken YAML", ("not valid YAML", "line 1", "Mend the line"), recipe=b"name: [tiny"),
    Case("wrong tag", ("not valid YAML", "recipe.yaml", "Mend the line"), recipe=b"name: !!timestamp x"),
    Case("no mapping", ("is a mapping", "recipe.yaml", "quickstart.yaml"), recipe=b"- name: tiny"),
    Case("empty recipe", ("is a mapping", "recipe.yaml", "quickstart.yaml"), recipe=b""),
    Case("key twice", ("key 'name' twice", "line 1", "Mend the line"), recipe=b"name: a\nname: b\n"),
    Case("no base", ("missing", "recipe.yaml: base", "Add this key"), changes={"base": None}),
    Case("no stage", ("no stage to run", "recipe.yaml", "add a section"), changes={"reward": None, "rl": None}),
    Case(
        "unknown key",
        ("unknown key", "recipe.yaml: rl.kl_coeff", "Did you mean rl.kl_coef?"),
        overrides=("rl.kl_coeff=0.1",),
    ),
    Case("unknown section", ("unknown key", "rewards", "Did you mean reward?"), overrides=("rewards.epochs=1",)),
    Case("unlike any key", ("unknown key", "lora.xyzzy", "Valid keys: rank"), overrides=("lora.xyzzy=1",)),
    Case("zero steps", ("greater than 0", "the value is 0", "Correct this value"), overrides=("rl.steps=0",)),
    Case(
        "negative rate",
        ("greater than 0", "reward.learning_rate", "Correct this"),
        overrides=("reward.learning_rate=-1",),
    ),
    Case("all held out", ("less than 1", "data.held_out", "the value is 1.0"), overrides=("data.held_out=1.0",)),
    Case("not a number", ("valid integer", "lora.rank", "'eight'"), overrides=("lora.rank=eight",)),
    Case(
        "no such algorithm",
        ("should be 'reinforce', 'ppo' or 'rloo'", "rl.algorithm", "'dpo'"),
        overrides=("rl.algorithm=dpo",),
    ),
    Case("rloo of one", ("samples_per_prompt", "rl", "at least 2"), overrides=("rl.algorithm=rloo",)),
    Case("name is a path", ("match pattern", "'../x'", "Correct this value"), overrides=("name=../x",)),
    Case("no KEY=VALUE", ("is not KEY=VALUE", "'rl.steps'", "For example"), overrides=("rl.steps",)),
    Case("override no YAML", ("not valid YAML", "'[1'", "Quote it"), overrides=("lora.layers=[1",)),
    Case("into a value", ("rank is a value", "lora.rank.x=1", "Check the key"), overrides=("lora.rank.x=1",)),
    Case("no section", ("no section sft", "sft.epochs=2", "Add `sft: {}`"), overrides=("sft.epochs=2",)),
    Case("stage not in recipe", ("no section sft", "tiny", "Add it"), command="sft"),
    Case(
        "stage too early",
        ("needs the adapter of reward", "reward", "perl-rlhf reward"),
        command="rl",
        overrides=("rl.reward={}",),
    ),
]

DATA = [
    Case(
        "no such source", ("no source 'jsonll'", "data.source", "mean jsonl?"), overrides=("data.source=jsonll",)
    ),
    Case("no such file", ("no such file", "gone.jsonl", "Check data.path"), overrides=("data.path=gone.jsonl",)),
    Case("nobody's home", ("no such file", "~nobody-here", "data.path"), overrides=("data.path=~nobody-here/x",)),
    Case("no path", ("needs a file", "data.path", "Set data.path"), overrides=("data.path=",)),
    Case("a folder", ("is a folder", "a file expected", "Set data.path"), overrides=("data.path=.",)),
    Case("empty data", ("it is empty", "own.jsonl", "Write one JSON object a line"), rows=b""),
    Case("no JSON", ("no usable row", "own.jsonl:1", "Write one JSON object a line"), rows=b"prompt,label\n"),
    Case(
        "no fields",
        ("fit no format", "['text', 'stars']", "{"),
        rows=[{"text": "A latte", "stars": 5}],
    ),
    Case(
        "one class",
        ("all", "thumbs up: there is nothing to tell apart", "Add ratings of the other kind"),
        rows=[{"prompt": user(f"{n}"), "completion": "Yes.", "label": True} for n in range(9)],
    ),
    Case(
        "one dialogue",
        ("1 dialogue cannot be split", "data.held_out", "Use more data"),
        rows=[{"prompt": user("Hi"), "completion": text, "label": text == "a"} for text in "ab"],
    ),
    Case(
        "one thumb down",
        ("has no thumbs down, of 1 in all", "data.held_out", "Use more data"),
        rows=[{"prompt": user(f"{n}"), "completion": "Yes.", "label": n > 0} for n in range(9)],
    ),
    Case(
        "prompts for a reward model",
        ("no ratings or comparisons", "which reward needs", "Use another source"),
        rows=[{"prompt": user(f"{n}")} for n in range(9)],
    ),
    Case(
        "no pairs",
        ("no pairs", "reward.loss", "reward.loss: thumbs"),
        rows=[{"prompt": user(f"{n}"), "completion": "Yes.", "label": n % 2} for n in range(20)],
        overrides=("reward.loss=pairs",),
    ),
    Case(
        "ratings for SFT",
        ("no demonstrations", "which sft needs", "Use another source"),
        changes={"sft": {}},
    ),
    Case(
        "prompt too long",
        ("a prompt has", "please please", "rl.max_prompt_length"),
        rows=[{"prompt": user(f"{n} {LONG}"), "completion": "Yes.", "label": n % 2} for n in range(20)],
    ),
    Case(
        "answer too long",
        ("no room for prompts", "answers of 256", "Lower rl.max_new_tokens"),
        overrides=("rl.max_new_tokens=256",),
    ),
    Case(
        "chat and text",
        ("5 of plain text and 1 of messages", "data.source jsonl", "Write all prompts as text"),
        rows=[{"prompt": user("a")} if n % 2 else {"prompt": f"{n}"} for n in range(9)],
        changes={"reward": None},
    ),
    Case(
        "no reward function",
        ("no such Python file", "gone.py:f", "Give FILE.py:NAME"),
        overrides=("rl.reward.function=gone.py:f",),
    ),
    Case(
        "no name in it",
        ("has no function 'f'", "own.py", "FILE.py:NAME"),
        overrides=("rl.reward.function=own.py:f",),
    ),
    Case("no function", ("has no function", "number", "Give"), overrides=("rl.reward.function=own.py:number",)),
    Case(
        "broken Python",
        ("cannot be imported", "bad.py", "Mend the file"),
        overrides=("rl.reward.function=bad.py:f",),
    ),
]

MODELS = [
    Case("no such folder", ("no such folder", "base.model ./gone", "hub id"), overrides=("base.model=./gone",)),
    Case("no such hub id", ("not a model", "base.model no/such", "hub id"), overrides=("base.model=no/such",)),
    Case("a file", ("no such folder", "own.py", "Give a hub id"), overrides=("base.model=own.py",)),
    Case("no config", ("not a model", "base.model", "config.json"), spoil=no_config),
    Case(
        "broken config",
        ("not a model", "base.model", "config.json"),
        spoil=lambda f: (f / "config.json").write_text("{"),
    ),
    Case(
        "unknown model",
        ("not a model", "xyzzy", "Give a hub id"),
        spoil=edit_json("config.json", model_type="xyzzy"),
    ),
    Case(
        "code of its own",
        ("custom code", "base.model", "Give a hub id"),
        spoil=edit_json("config.json", model_type="xyzzy", auto_map={"AutoConfig": "own.Config"}),
    ),
    Case("no causal LM", ("not a causal LM but BertModel", "base.model", "Give a hub id"), spoil=masked_lm),
    Case("no weights", ("cannot be loaded", "base.model", "model.safetensors"), spoil=no_weights),
    Case("pickled weights", ("cannot be loaded", "base.model", "model.safetensors"), spoil=pickled_weights),
    Case("half the weights", ("cannot be loaded", "base.model", "model.safetensors"), spoil=half_the_weights),
    Case("other shapes", ("cannot be loaded", "base.model", "model.safetensors"), spoil=longer_layers),
    Case(
        "missing weights",
        ("weights are not in its files", "model.layers.2.", "Complete the files"),
        spoil=edit_json("config.json", num_hidden_layers=3),
    ),
    Case("no tokenizer", ("no usable tokenizer", "base.model", "tokenizer.json"), spoil=no_tokenizer),
    Case(
        "no end token",
        ("has no end token", "spoilt", "Set eos_token"),
        spoil=edit_json("tokenizer_config.json", eos_token=None),
    ),
    Case(
        "template of roles it lacks",
        ("the chat template refuses", "only lists", "Use a base whose chat template"),
        spoil=lambda folder: (folder / "chat_template.jinja").write_text(
            "{{ raise_exception('only lists') if messages|length else '' }}"
        ),
    ),
    Case("no such module", ("no module matches ['x']", "lora.targets", "q_proj"), overrides=("lora.targets=[x]",)),
    Case("no such layer", ("no layer 9", "lora.layers", "layers 0 to 1"), overrides=("lora.layers=[9]",)),
    Case(
        "no model configured",
        ("not the configuration of a causal LM", "base.config", "Give model_type"),
        changes={"base": {"config": {"model_type": "xyzzy"}, "random_init": True}},
    ),
    Case(
        "impossible configuration",
        ("not the configuration of a causal LM", "base.config", "Give model_type"),
        changes={"base": {"config": {"model_type": "llama", "hidden_size": "x"}, "random_init": True}},
    ),
    Case(
        "4-bit without its library",
        ("4-bit weights need bitsandbytes", "base.quantization", "pip install"),
        overrides=("base.quantization=4bit",),
    ),
]

FOLDERS = [
    Case("another run", ("holds another run", "seed is 7, here 0", "Use another --out"), out=another_recipe),
    Case("a broken run", ("not valid YAML", "recipe.yaml", "Mend the line"), out=broken_recipe),
    Case("a broken result", ("not JSON", "result.json", "Remove it"), out=broken_result),
    Case("out is a file", ("cannot be written", "out", "another --out"), out=lambda out: out.write_text("x")),
]


@pytest.mark.parametrize(
    "case", [*RECIPES, *DATA, *MODELS, *FOLDERS], ids=lambda case: case.name.replace(" ", "-")
)
def test_bad_input_is_one_message(
    case: Case,
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(REWARDS)
    (tmp_path / "bad.py").write_text("def f(:\n")
    changes = dict(case.changes)
    if case.rows is not None:
        file = tmp_path / "own.jsonl"
        file.write_bytes(case.rows) if isinstance(case.rows, bytes) else write_rows(file, case.rows)
        changes["data"] = {"source": "jsonl", "path": "own.jsonl"}
    if case.spoil is not None:
        spoilt = tmp_path / "spoilt"
        shutil.copytree(tiny_llama, spoilt)
        case.spoil(spoilt)
        changes["base"] = {"model": "spoilt", "dtype": "float32"}
    recipe, out = write_recipe(**changes), tmp_path / "out"
    if case.recipe is not None:
        recipe.write_bytes(case.recipe) if case.recipe != b"\0" else recipe.unlink()
    if case.out is not None:
        case.out(out)
    before = sorted(tmp_path.rglob("*"))

    status, written = run_cli(case.command, recipe, *case.overrides, "--out", out)

    assert status == 2, written
    assert "Traceback" not in written
    assert written.count("error: ") == 1
    for phrase in case.says:
        assert phrase in written
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("short", "must return 2 finite numbers, one an answer; it returned [0.0]"),
        ("nan", "score 0 is nan"),
        ("raises", "the reward function failed: KeyError: 'colour'"),
    ],
)
def test_a_reward_function_that_fails_is_named(
    function: str, says: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(REWARDS)
    recipe, out = write_recipe(reward=None), tmp_path / "out"
    status, written = run_cli("run", recipe, f"rl.reward.function=own.py:{function}", "--out", out)
    assert status == 2
    assert says in written
    assert "own.py" in written
    assert "Traceback" not in written
    assert not list(out.glob("**/adapter"))
    assert not (out / "policy").exists()


def test_a_folder_in_use_is_refused(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "a") as lock:  # another opening of the file is what another process has
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, written = run_cli("run", write_recipe(), "--out", out)
    assert status == 2
    assert "another run is using this folder" in written
    assert str(out) in written
    assert "Wait for it" in written
    assert [file.name for file in out.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("evaluate", "gone", "reward"), ("not a run folder", "gone", "--out")),
        (("evaluate", "gone", "critic"), ("no role 'critic'", "ROLE", "reward or policy")),
        (("chat", "gone"), ("not a run folder", "gone", "--out")),
        (("data", "check", "cofee-simulator"), ("no source", "data.source", "coffee-simulator?")),
        (("data", "check", "gone.jsonl"), ("no such file", "gone.jsonl", "Check data.path")),
        (("data", "check", "jsonl:"), ("names no path", "'jsonl:'", "jsonl:PATH")),
        (("data", "fetch", "tea"), ("nothing to fetch", "'tea'", "taskmaster-coffee")),
    ],
)
def test_other_commands_refuse_in_the_same_way(
    command: tuple[str, ...],
    says: tuple[str, ...],
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, written = run_cli(*command)
    assert status == 2
    assert "Traceback" not in written
    assert written.startswith("error: ")
    for phrase in says:
        assert phrase in written
    assert not list(tmp_path.iterdir())
