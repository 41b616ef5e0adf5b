"""Recipes: round trip, overrides, paths and messages; any text gives a Recipe or a UserError."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perl.errors import UserError
from perl.recipe import Recipe, load_recipe
from perl.stages.identity import settings_sha256
from tests.near_recipes import GOOD, OVERRIDES, YAML, near_recipes

EXAMPLES = int(os.environ.get("PERL_FUZZ_EXAMPLES", "100"))
RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def write(folder: Path, content: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(file, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads_and_says_what_it_is_called(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert recipe.stages


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        {"name": "a", "base": {"model": "org/model"}, "reward": {}},
        {
            "name": "b",
            "base": {
                "config": {"model_type": "llama", "bos_token_id": None, "x": {"y": None}},
                "random_init": True,
            },
            "reward": {},
        },
    ],
    ids=["full", "least", "config"],
)
def test_what_is_written_reads_as_the_same_recipe(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, content))
    again = tmp_path / "again"
    again.mkdir()
    assert load_recipe(write(again, recipe.to_yaml())) == recipe


def test_overrides_take_yaml_values_and_make_sections(tmp_path: Path) -> None:
    file = write(tmp_path, {"name": "x", "base": {"model": "org/model"}, "reward": {}})
    overrides = ["reward.learning_rate=1e-3", "lora.layers=[0, 2]", "data.held_out=0.5", "name=y", "seed=4"]
    recipe = load_recipe(file, overrides)
    assert recipe.reward is not None
    assert recipe.reward.learning_rate == 1e-3
    assert recipe.lora.layers == [0, 2]
    assert recipe.data.held_out == 0.5
    assert (recipe.name, recipe.seed) == ("y", 4)
    assert load_recipe(file, ["seed=1", "seed=2"]).seed == 2, "the later one holds"
    assert load_recipe(file, ["data.path=a=b"]).data.path == "a=b", "the first = divides"


def test_yes_is_no_number_and_off_is_none_of_it(tmp_path: Path) -> None:
    """YAML reads on and yes as true, which would be 1: a validation after every step, or a learning rate of 1."""
    file = write(tmp_path, GOOD)
    for override in ("sft.eval_steps=on", "sft.learning_rate=yes", "rl.steps=true", "lora.rank=true", "seed=yes"):
        key = override.partition("=")[0]
        assert f"{key}: input should be a valid number (the value is True)" in refused(file, override)
    recipe = load_recipe(file, ["rl.best_of_n=off", "rl.whiten=on"])
    assert recipe.rl is not None
    assert (recipe.rl.best_of_n, recipe.rl.whiten) == (0, True)


def test_an_override_takes_a_value_back_to_its_default(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    assert load_recipe(file, ["data.path="]).data.path is None
    assert load_recipe(file, ["sft="]).stages == ("reward", "rl")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rl.kl_coeff", "rl.kl_coef"),
        ("rl.reward.functoin", "rl.reward.function"),
        ("rl.max_tokens", "rl.max_new_tokens"),
        ("sft.batchsize", "sft.batch_size"),
        ("reward.lr", None),
        ("lora.r", None),
        ("lora.target", "lora.targets"),
        ("base.build.hiddensize", "base.build.hidden_size"),
        ("data.heldout", "data.held_out"),
        ("data.evalpath", "data.eval_path"),
        ("sede", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, meant: str | None, tmp_path: Path) -> None:
    message = refused(write(tmp_path, GOOD), f"{key}=1")
    assert f"recipe.yaml: {key}: unknown key" in message
    assert (f"Did you mean {meant}?" if meant else "Valid keys: ") in message


def test_the_short_form_of_a_function_takes_the_settings_of_the_long_one(tmp_path: Path) -> None:
    short = {"function": "own.py:f", "time_limit": 5, "own_process": True}
    file = write(tmp_path, {"name": "x", "base": {"model": "org/model"}, "rl": {"reward": short}})
    rl = load_recipe(file).rl
    assert rl is not None
    assert rl.reward_parts == load_recipe(file, ["rl.reward.kind=function"]).rl.reward_parts  # type: ignore[union-attr]
    assert "Did you mean rl.reward.own_process?" in refused(file, "rl.reward.ownprocess=true")


LORA = {"name": "x", "base": {"model": "org/model"}, "reward": {}}


def test_lora_is_short_for_an_adapter_of_that_kind(tmp_path: Path) -> None:
    short = load_recipe(write(tmp_path, {**LORA, "lora": {"rank": 4}}))
    long = load_recipe(write(tmp_path, {**LORA, "adapter": {"kind": "lora", "rank": 4}}))
    assert short == long
    assert settings_sha256(short, "reward") == settings_sha256(long, "reward")
    assert (short.adapter_kind, short.adapter_settings) == ("lora", short.lora)
    assert load_recipe(write(tmp_path, LORA)) == load_recipe(
        write(tmp_path, {**LORA, "adapter": {"kind": "lora"}})
    )
    assert "adapter" not in yaml.safe_load(long.to_yaml())


@pytest.mark.parametrize(
    "section", [{"lora": {"targets": ["q_proj"]}}, {"adapter": {"kind": "lora", "targets": ["q_proj"]}}]
)
def test_an_override_reaches_the_adapters_by_either_name(section: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, {**LORA, **section})
    for name in ("lora", "adapter"):
        recipe = load_recipe(file, [f"{name}.rank=3"])
        assert recipe.lora is not None
        assert (recipe.lora.rank, recipe.lora.targets) == (3, ["q_proj"])


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"adapter": {"kind": "lorra"}}, "no adapter kind 'lorra'\n  Did you mean lora?"),
        ({"adapter": {"kind": "xyz"}}, "no adapter kind 'xyz'\n  There are "),
        ({"adapter": {"kind": "pissa"}}, "pissa is not supported, because it rewrites the base's weights"),
        (
            {"adapter": {"kind": "LoRA-GA"}},
            "kind LoRA-GA is not supported, because it rewrites the base's weights",
        ),
        ({"adapter": {"rank": 4}}, "adapter.kind: missing"),
        ({"adapter": "lora"}, "adapter: a section with keys and values is expected"),
        ({"adapter": {"kind": "lora", "rank": 0}}, "lora.rank: input should be greater than 0"),
        ({"adapter": {"kind": "lora"}, "lora": {}}, "lora is short for adapter with kind lora\n  Give only one"),
        ({"adapter": {"kind": "scale"}, "lora": {}}, "lora is short for adapter with kind lora\n  Give only one"),
    ],
)
def test_an_impossible_adapter_is_refused(section: dict[str, Any], says: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path, {**LORA, **section}))
    assert says in message
    assert "recipe.yaml" in message


@pytest.mark.parametrize(
    "text", ["name: a\nname: b\n", "rl:\n  steps: 1\n  steps: 2\n", "base: {model: a, model: b}\n"]
)
def test_a_key_given_twice_is_refused(text: str, tmp_path: Path) -> None:
    assert "twice" in refused(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rl.steps=0", "rl.steps"),
        ("rl.steps=1.5", "rl.steps"),
        ("rl.steps=", "rl.steps"),
        ("rl.temperature=0", "rl.temperature"),
        ("rl.temperature=.inf", "rl.temperature"),
        ("rl.temperature=.nan", "rl.temperature"),
        ("rl.temperature=1e-9", "rl.temperature"),
        ("rl.temperature=101", "rl.temperature"),
        ("rl.learning_rate=.nan", "rl.learning_rate"),
        ("rl.kl_coef=1", "rl.kl_coef"),
        ("rl.critic=adapter", "rloo has no critic"),
        ("rl.algorithm=ppo2", "rl.algorithm"),
        ("rl.reward=", "rl.reward"),
        ("lora.layers=middle", "lora.layers"),
        ("lora.layers=[-1]", "lora.layers"),
        ("lora.dropout=1", "lora.dropout"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
        ("tuning=half", "tuning"),
        ("base.dtype=float8", "base.dtype"),
        ("base={model: org/model, build: {}}", "exactly one of model, build and config"),
        ("sft.warmup_ratio=1", "sft.warmup_ratio"),
        ("sft.weight_decay=-0.1", "sft.weight_decay"),
        ("sft.lr_scheduler_type=cosin", "Did you mean cosine?"),
        ("sft.lr_scheduler_type=cosine_with_min_lr", "'linear', 'cosine', 'constant'"),
        ("base.build.heads=3", "hidden_size 32 is not an even multiple of heads 3"),
        ("base.build={steps: many}", "base.build.steps"),
        ("data.held_out=0", "data.held_out"),
        ("data=own.jsonl", "data"),
        ("name=a/b", "name"),
        ("name=", "name"),
    ],
)
def test_impossible_values_are_refused_where_they_stand(override: str, says: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path, GOOD), override)
    assert says in message
    assert "recipe.yaml" in message
    what = message.partition("\n")[0]
    value = override.partition("=")[2]
    assert len(what) < 400, value


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("rl.steps=0", "The default is 100."),
        ("lora.layers=middle", "The default is all."),
        ("lora.targets=3", "The default is all-linear."),
        ("rl.algorithm=rlo", "Did you mean rloo?"),
        ("rl.algorithm=sarsa", "The default is ppo."),
        ("sft.lr_scheduler_type=dull", "The default is cosine."),
        ("name=a/b", "recipes/quickstart.yaml shows a complete recipe."),
        ("base.model=5", "recipes/quickstart.yaml shows a complete recipe."),
        ("base.build.heads=3", "Choose a multiple of 6."),
    ],
)
def test_the_remedy_for_an_impossible_value(override: str, remedy: str, tmp_path: Path) -> None:
    assert refused(write(tmp_path, GOOD), override).partition("\n")[2].strip() == remedy


@pytest.mark.parametrize(
    ("found", "overrides", "left"),
    [
        ("{build: {layers: 2}, dtype: float32}", ["base.model=org/m"], {"model": "org/m", "dtype": "float32"}),
        ("{model: org/m, trust_remote_code: true}", ["base.build.layers=2"], {"build": {"layers": 2}}),
        ("{config: {model_type: llama}, random_init: true}", ["base.model=org/m"], {"model": "org/m"}),
        (
            "{model: org/m}",
            ["base.config={model_type: llama}", "base.random_init=true"],
            {"config": {"model_type": "llama"}, "random_init": True},
        ),
        ("{build: {layers: 2}}", ["base.build.heads=2"], {"build": {"layers": 2, "heads": 2}}),
    ],
)
def test_an_override_of_the_bases_origin_replaces_the_other_one(
    found: str, overrides: list[str], left: dict[str, object], tmp_path: Path
) -> None:
    recipe = load_recipe(write(tmp_path, f"name: x\nbase: {found}\nreward: {{}}\n"), overrides)
    assert recipe.base.model_dump(exclude_unset=True) == left


def test_two_origins_in_overrides_are_refused(tmp_path: Path) -> None:
    assert "exactly one of" in refused(write(tmp_path, GOOD), "base.model=org/m", "base.build={}")


@pytest.mark.parametrize(
    ("found", "overrides", "left"),
    [
        ("lora: {rank: 4}", ["adapter={kind: miss}"], {"kind": "miss", "rank": 64}),
        ("lora: {rank: 4}", ["adapter={kind: miss}", "adapter.rank=2"], {"kind": "miss", "rank": 2}),
        ("adapter: {kind: miss}", ["lora={rank: 4}"], {"rank": 4, "alpha": 16}),
        ("adapter: {kind: miss}", ["lora.rank=4"], {"kind": "miss", "rank": 4}),
        ("lora: {rank: 4}", ["adapter.rank=2", "adapter.kind=dora"], {"kind": "dora", "rank": 2}),
        ("lora: {rank: 4, alpha: 8}", ["adapter.kind=prefix"], {"kind": "prefix"}),
        ("adapter: {kind: prefix, length: 4}", ["adapter.kind=dora"], {"kind": "dora", "rank": 8}),
        ("lora: {rank: 4}", ["adapter.kind=lora"], {"rank": 4, "alpha": 16}),
        ("lora: {rank: 4}", ["adapter=null"], {"rank": 4, "alpha": 16}),
    ],
)
def test_an_override_of_the_adapters_replaces_the_other_section(
    found: str, overrides: list[str], left: dict[str, object], tmp_path: Path
) -> None:
    """A whole section replaces it completely; `lora` is short for `adapter`, so their keys are the same."""
    recipe = load_recipe(write(tmp_path, f"name: x\nbase: {{model: org/m}}\n{found}\nreward: {{}}\n"), overrides)
    assert recipe.adapter_settings.model_dump(include={"kind", "rank", "alpha"} & set(left)) == left
    assert recipe.adapter_kind == left.get("kind", "lora")


def test_a_setting_that_an_override_gives_is_not_dropped_with_the_old_kind(tmp_path: Path) -> None:
    assert "rank is no setting" in refused(write(tmp_path, GOOD), "adapter.kind=prefix", "adapter.rank=4")


def test_two_sections_of_adapters_in_overrides_are_refused(tmp_path: Path) -> None:
    assert "give only one of the two" in refused(write(tmp_path, GOOD), "lora={}", "adapter={kind: miss}").lower()


def test_paths_are_looked_up_beside_the_recipe_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        (folder / "model").mkdir(parents=True)
    (beside / "f.py").touch()
    (here / "own.jsonl").touch()
    monkeypatch.chdir(here)
    recipe = load_recipe(write(beside, GOOD), ["base={model: model}"])
    assert recipe.base.model == str((beside / "model").resolve())
    assert recipe.data.path == str((here / "own.jsonl").resolve())
    assert recipe.rl is not None
    assert recipe.rl.reward.function == f"{(beside / 'f.py').resolve()}:f"


def test_a_link_keeps_its_name_whose_suffix_says_how_to_read_it(tmp_path: Path) -> None:
    """In the hub's cache, and with git-annex or DVC, files are links to others that are named by their hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b2c").write_text("prompt,completion\na,b\n")
    for name in ("rows.csv", "f.py"):
        (tmp_path / name).symlink_to("blobs/0a1b2c")
    recipe = load_recipe(write(tmp_path, GOOD), ["data.path=blobs/../rows.csv", "rl.reward.function=f.py:f"])
    assert recipe.data.path == str(tmp_path / "rows.csv")
    assert recipe.rl is not None
    assert recipe.rl.reward.function == f"{tmp_path / 'f.py'}:f"


def test_what_is_no_path_stays_as_it_is(tmp_path: Path) -> None:
    overrides = ["base={model: org/model}", "data.path=~no-such-user/x", f"rl.reward.function={'x' * 5000}.py:f"]
    recipe = load_recipe(write(tmp_path, GOOD), overrides)
    assert recipe.base.model == "org/model"
    assert recipe.data.path == "~no-such-user/x"


# Fuzzing: whatever the text, a Recipe or a UserError.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load_or_refuse(folder: Path, text: str, overrides: list[str]) -> None:
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(file, overrides)
    except UserError as refusal:
        error = refusal
    else:
        assert isinstance(recipe, Recipe)
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(file) == recipe
        return
    assert error.what
    assert len(str(error)) < 3000


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(YAML, st.lists(OVERRIDES, max_size=2))
def test_any_text_is_a_recipe_or_refused(folder: Path, text: str, overrides: list[str]) -> None:
    load_or_refuse(folder, text, overrides)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(near_recipes(), st.lists(OVERRIDES, max_size=2))
def test_any_near_recipe_is_a_recipe_or_refused(folder: Path, text: str, overrides: list[str]) -> None:
    load_or_refuse(folder, text, overrides)


def test_bytes_in_a_recipe(folder: Path) -> None:
    """They are neither text nor a path."""
    (folder / "binary.yaml").write_text("name: x\nplugins: [!!binary '']\n")
    with pytest.raises(UserError, match="write it as text"):
        load_recipe(folder / "binary.yaml")


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(st.binary())
def test_any_bytes_are_refused(folder: Path, content: bytes) -> None:
    file = folder / "bytes.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError):
        load_recipe(file)
