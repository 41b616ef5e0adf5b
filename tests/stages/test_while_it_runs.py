"""Output of a run that is not finished: its page, its samples, and metrics sent to trackers."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perl.runs.trackers import sending
from perl.stages import report_file
from tests.conftest import LEAVES, RunCli, WriteRecipe

RL = {
    "reward": {"function": "leaves.py:leaves"},
    "steps": 4,
    "prompts_per_step": 2,
    "max_new_tokens": 2,
    "eval_samples": 1,
}


def test_an_interrupted_run_can_be_read(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page exists, `report` rewrites it, and repeated steps have their samples once."""
    monkeypatch.setattr(report_file, "PAGE_EVERY", 0.0)
    monkeypatch.setattr(report_file, "PAGE_SHARE", 1.0)
    monkeypatch.setenv("LEAVE_AT", "5")
    (tmp_path / "leaves.py").write_text(LEAVES)
    recipe, out = write_recipe(reward=None, rl=RL | {"eval_prompts": 2, "sample_every": 1}), tmp_path / "out"
    assert run_cli("run", recipe, "--out", out)[0] == 130
    page = (out / "report.html").read_text()
    assert "This run is not finished" in page
    assert "RL had taken" in page
    assert "The base is unchanged" not in page, "the base is hashed when all is done"
    (out / "report.html").unlink()
    status, written = run_cli("report", out)
    assert status == 0, written
    assert "During training" in (out / "report.html").read_text()
    waited = json.loads((out / "policy" / "waited.json").read_text())
    monkeypatch.delenv("LEAVE_AT")
    status, written = run_cli("run", recipe, "--out", out)
    assert status == 0, written
    assert "This run is not finished" not in (out / "report.html").read_text()
    assert not (out / "progress.json").exists()
    result = json.loads((out / "policy" / "result.json").read_text())
    assert result["waited_seconds"] > waited > 0
    assert result["waited_seconds"] > result["seconds"]
    lines = [json.loads(line) for line in (out / "policy" / "samples-by-step.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert list(lines[0]["answers"]) == ["policy"]
    assert isinstance(lines[0]["answers"]["policy"]["reward"], float)


def test_metrics_of_every_stage_are_in_tensorboard(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    recipe, out = write_recipe(data=data, sft={"batch_size": 4, "max_length": 64}), tmp_path / "out"
    status, written = run_cli("run", recipe, "report_to=[tensorboard]", "--out", out)
    assert status == 0, written
    for stage, role, metric in (("sft", "sft", "loss"), ("reward", "reward", "loss"), ("rl", "policy", "kl")):
        events = EventAccumulator(str(out / "tensorboard" / stage)).Reload().Scalars(f"{stage}/{metric}")
        lines = [json.loads(line) for line in (out / role / "metrics.jsonl").read_text().splitlines()]
        assert [one.step for one in events] == [line["step"] for line in lines]
        assert [one.value for one in events] == pytest.approx([line[metric] for line in lines])
    assert all(path.is_file() for path in (out / "tensorboard").glob("*/*")), "no folders of accelerate's own"


class Elsewhere(ModuleType):
    """A stand-in for wandb or trackio that records its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.told: list[tuple[str, Any]] = []
        self.config = self

    def init(self, **options: Any) -> "Elsewhere":
        """Record the arguments of a run's start."""
        self.told.append(("init", options))
        return self

    def update(self, values: dict[str, Any], **_: Any) -> None:
        """Record the configuration."""
        self.told.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Record metrics."""
        self.told.append(("log", (step, values)))

    def finish(self) -> None:
        """Record the end."""
        self.told.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_by_accelerates_interface(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Elsewhere(name)
    fresh: dict[str, Any] = {}
    monkeypatch.setattr(PartialState, "_shared_state", fresh)  # as in a process that has just begun
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with sending([name], "mine", "rl", tmp_path, {"seed": 0, "lora.layers": [1]}, done=0) as send:
        send(1, {"kl": 0.5})
    (_, options), *rest = package.told
    assert (options["project"], options["name"]) == ("mine", "rl")
    assert options.get("mode", "offline") == "offline", "nobody is logged in"
    assert rest == [("config", {"seed": 0, "lora.layers": "[1]"}), ("log", (1, {"rl/kl": 0.5})), ("finish", None)]


def test_a_tracker_that_is_not_installed(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    status, written = run_cli("run", write_recipe(), "report_to=[trackio]", "--out", tmp_path / "out")
    assert status == 2
    assert "report_to: trackio is not installed" in written
    assert "pip install trackio" in written
    assert not (tmp_path / "out").exists()
