"""Stages' results, report.json and the page share one set of types, completely and exclusively."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from perl.errors import UserError
from perl.measure.change import Change
from perl.measure.slices import Slice
from perl.results import Hardware, Report, RewardStage, RlStage, SftStage
from perl.rl.results import RlEval
from perl.runs.folder import STAGE_ROLE, RunFolder
from perl.system.typed_json import as_json, made, parse
from tests.report.made import make_run

SLICE = {"by": "source", "name": "shop", "n": 9, "share_up": 0.5}


def test_optional_fields_without_a_value_are_left_out() -> None:
    """Required fields with unknown values are null."""
    assert as_json(made(Slice, SLICE)) == SLICE
    assert as_json(made(Slice, SLICE | {"auroc": 0.5, "interval": (0.4, 0.6)})) == SLICE | {
        "auroc": 0.5,
        "interval": [0.4, 0.6],
    }
    machine = Hardware(device="cpu", name="x", cores=None, memory_bytes=1, processes=1, engine="none")
    assert as_json(machine)["cores"] is None


def test_a_producer_may_write_no_key_that_is_no_field() -> None:
    with pytest.raises(ValidationError, match="recall"):
        made(Slice, SLICE | {"recall": 1.0})
    with pytest.raises(ValidationError, match="share_up"):
        made(Slice, {key: value for key, value in SLICE.items() if key != "share_up"})


@pytest.mark.parametrize("rich", [True, False])
def test_a_report_comes_back_as_it_was(rich: bool, tmp_path: Path) -> None:
    text = (make_run(tmp_path / "a", rich=rich) / "report.json").read_text()
    assert as_json(parse(Report, text, "report.json", "")) == json.loads(text)


def test_results_of_stages_come_back_as_they_were(tmp_path: Path) -> None:
    report = parse(Report, (make_run(tmp_path / "a") / "report.json").read_text(), "report.json", "")
    folder = RunFolder(tmp_path / "b")
    for name, stage in report.stages.finished.items():
        folder.role(STAGE_ROLE[name]).mkdir(parents=True)
        assert folder.result(name) is None
        folder.finish(name, stage)
        assert folder.result(name) == stage
    assert folder.results() == report.stages


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not text"),
        (b"[]", "Input should be"),
        (b'{"eval": {"n": 3}}', "Field required"),
        (b'{"seconds": "long"}', "seconds: Input should be a valid number"),
    ],
)
def test_a_broken_result_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "sft" / "result.json"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        RunFolder(tmp_path).result("sft")
    assert str(file) in str(caught.value)
    assert "Remove it to run the stage again." in str(caught.value)


def test_no_field_is_without_a_run_that_has_it(tmp_path: Path) -> None:
    """The page's test runs have every field; the fields of real runs are checked when they are created."""
    report = parse(Report, (make_run(tmp_path / "a") / "report.json").read_text(), "report.json", "")
    stages = report.stages
    for stage, kind in ((stages.sft, SftStage), (stages.reward, RewardStage), (stages.rl, RlStage)):
        assert stage is not None
        missing = {field.name for field in dataclasses.fields(kind) if getattr(stage, field.name) is None}
        assert missing == set()
        assert None not in [value for name, value in vars(stage.eval).items() if name != "intervals"]


def test_the_names_that_scripts_rely_on() -> None:
    promised = (
        "algorithm steps n reward_before reward_after reward_interval gold_before gold_after gold_interval kl "
        "pass_at_1_before pass_at_1_after"
    )
    assert set(promised.split()) <= {field.name for field in dataclasses.fields(RlEval)}


def test_the_change_of_a_metric_is_made_of_its_flat_keys() -> None:
    flat = {"algorithm": "ppo", "critic": "none", "steps": 9, "n": 4, "kl": 0.1, "ended_before": 1.0}
    flat |= {"reward_before": 0.1, "reward_after": 0.4, "reward_interval": (0.2, 0.5), "ended_after": 0.5}
    rl = made(RlEval, flat | {"answer_tokens_before": 9.0, "answer_tokens_after": 8.0})
    assert rl.change("reward") == Change(0.1, 0.4, (0.2, 0.5))
    assert rl.change("ended") == Change(1.0, 0.5, None)
    assert rl.change("gold") is None


def test_results_are_read_without_the_libraries_that_make_them() -> None:
    """The libraries take seconds to import."""
    code = "import sys, perl.results; print({'torch', 'sklearn', 'scipy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
