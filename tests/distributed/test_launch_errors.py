"""What a launcher asks for and cannot be had is refused once, with the remedy."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from perl.errors import UserError
from perl.parallel.engine import Engine, engine_asked_for
from perl.parallel.processes import ALONE, Processes
from perl.recipe import Recipe, load_recipe
from perl.stages.engines import check_engine
from tests.conftest import RunCli
from tests.distributed.launching import ENGINES, finished, start, torchrun


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_once(
    recipes: dict[str, Path], tmp_path: Path
) -> None:
    status, said = finished(torchrun(3, "-m", "perl", "run", recipes["all"], "--out", tmp_path / "out"))
    assert status != 0
    assert said.count("4 cannot be dealt evenly to 3 processes") == 1
    assert "Set it to 3 or 6, or launch a number of processes that divides 4." in said
    assert "Traceback" not in said.split("ChildFailedError")[0].split("\nTraceback")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "zero3", "fsdp2"])
def test_accelerate_launches_the_command_line(engine: str, recipes: dict[str, Path], tmp_path: Path) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ENGINES / f"{engine}.yaml"]
    out = tmp_path / "out"
    status, said = finished(start([*command, "-m", "perl", "run", recipes["rloo"], "--out", out], {}))
    assert status == 0, said
    hardware = json.loads((out / "report.json").read_text())["hardware"]
    assert (hardware["processes"], hardware["engine"]) == (2, engine)
    assert said.count("Written:") == 1


@pytest.mark.parametrize("command", ["evaluate", "chat", "report", "estimate"])
def test_a_command_for_one_process_is_refused_once(
    command: str, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", f"{command} is for one process, and a launcher has started 2"), ("1", "")):
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
        engine_asked_for(Processes(0, 2))
    assert refusal.value.where == str(file)


def test_deepspeed_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="not installed") as refusal:
        engine_asked_for(Processes(0, 2))
    assert "perl-rlhf[deepspeed]" in str(refusal.value)


class Spreads(Engine):
    """An engine that shards the base."""

    name = "spreads"

    @property
    def shards_base(self) -> bool:
        return True


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
        check_engine(Spreads(Processes(0, 2)), recipe)
    check_engine(Engine(Processes(0, 2)), recipe)


def test_one_process_needs_no_launcher_and_divides_everything(recipes: dict[str, Path]) -> None:
    assert engine_asked_for(ALONE).name == "ddp"
    check_engine(Engine(ALONE), load_recipe(recipes["all"]))
    assert [ALONE.deal(3), Processes(0, 2).deal(3), Processes(1, 2).deal(3)] == [[0, 1, 2], [0, 1], [2, 2]]
