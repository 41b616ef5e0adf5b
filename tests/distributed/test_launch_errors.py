"""Impossible requests of a launcher are refused once, with the remedy."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from perl.errors import UserError
from perl.parallel.engine import Engine, engine_from_environment
from perl.parallel.processes import ALONE, Processes
from perl.recipe import Recipe, load_recipe
from perl.stages.opening import check_engine
from tests.conftest import RunCli


@pytest.mark.parametrize("command", ["evaluate", "chat", "report", "estimate"])
def test_a_command_for_one_process_is_refused_once(
    command: str, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", f"{command} runs in one process, but a launcher has started 2"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        status, text = run_cli(command, "runs/any", *(["reward"] if command == "evaluate" else []))
        assert status == 2
        assert said in text
        assert bool(said) == bool(text.strip())


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_config_with_its_own_optimizer_or_schedule_is_refused(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, section: {"type": "WarmupLR", "params": {}}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match=f"its own {section}") as refusal:
        engine_from_environment(Processes(0, 2))
    assert refusal.value.where == str(file)


def test_deepspeed_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="not installed") as refusal:
        engine_from_environment(Processes(0, 2))
    assert "perl-rlhf[deepspeed]" in str(refusal.value)


class Shards(Engine):
    """An engine that shards the base."""

    name = "shards"
    shards_base = True


@pytest.mark.parametrize(
    ("changes", "what"), [({"tuning": "full"}, "full tuning has neither"), ({"four_bit": True}, "quantized")]
)
def test_what_an_engine_cannot_shard_is_refused(
    changes: dict[str, object], what: str, recipes: dict[str, Path]
) -> None:
    content = yaml.safe_load(recipes["rloo"].read_text())
    if changes.pop("four_bit", False):
        content["base"]["quantization"] = "4bit"
    recipe = Recipe.model_validate(content | changes)
    with pytest.raises(UserError, match=what):
        check_engine(Shards(Processes(0, 2)), recipe)
    check_engine(Engine(Processes(0, 2)), recipe)


def test_each_process_needs_a_completion_for_each_minibatch(recipes: dict[str, Path]) -> None:
    sizes = ["rl.prompts_per_step=4", "rl.samples_per_prompt=2", "rl.epochs=1"]
    recipe = load_recipe(recipes["rloo"], [*sizes, "rl.minibatches=5"])
    with pytest.raises(UserError, match="4 completions per process cannot make 5 minibatches") as refusal:
        check_engine(Engine(Processes(0, 2)), recipe)
    assert "at most 4" in str(refusal.value)
    check_engine(Engine(ALONE), recipe)


def test_one_process_needs_no_launcher_and_divides_everything(recipes: dict[str, Path]) -> None:
    assert engine_from_environment(ALONE).name == "ddp"
    check_engine(Engine(ALONE), load_recipe(recipes["all"]))
    assert [ALONE.shard(3), Processes(0, 2).shard(3), Processes(1, 2).shard(3)] == [[0, 1, 2], [0, 1], [2, 2]]
