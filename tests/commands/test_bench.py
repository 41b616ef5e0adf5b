"""The benchmark runs, and refuses what it cannot run. TRL's part needs a release that is not installed here."""

import json
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest

from perl.bench import work
from perl.bench.measurement import Measurement, PeakOverStart
from perl.commands import bench as command
from perl.errors import UserError
from tests import forks
from tests.conftest import RunCli
from tests.tiny import LLAMA


def test_it_measures_both_tunings(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tuning runs in its own process, here a fork."""
    monkeypatch.setattr("perl.commands.bench.subprocess", SimpleNamespace(run=forks.run))
    monkeypatch.setitem(work.MODELS, "100m", LLAMA)
    file = tmp_path / "bench.json"
    code, text = run_cli("bench", "--repeats", "1", "--steps", "2", "--layers", "top-half", "--json", str(file))
    assert code == 0, text
    found = json.loads(file.read_text())
    assert set(found) == {"ours", "tuning_full", "lora_to_full"}
    for side in (found["ours"], found["tuning_full"]["ours"]):
        assert len(side["all_seconds"]) == 2
        assert min(side["all_seconds"]) <= side["seconds_per_step"] <= max(side["all_seconds"])
        assert set(side["phases"]) == {"generate", "score", "update"}
        assert side["peak_over_start_bytes"] > 0
    assert "LoRA / full" in text


def test_trl_is_measured_beside_ours(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of both sides' processes is faked: TRL's has our steps."""
    commands = []

    def measured(side: str, command: list[object], library: Path | None = None) -> Measurement:
        commands.append([str(part) for part in command])
        seconds = 4.0 if side == "trl" else 1.0
        return Measurement([{"all": 9.0}, {"all": seconds}, {"all": seconds}], int(seconds * 1e9))

    monkeypatch.setattr(command, "_measure", measured)
    file = tmp_path / "bench.json"
    asked = ("--algorithm", "grpo", "--repeats", "1", "--dtype", "float32")
    code, text = run_cli("bench", *asked, "--json", str(file))
    assert code == 0, text
    found = json.loads(file.read_text())
    assert set(found) == {"ours", "trl", "ratio", "tuning_full", "lora_to_full"}
    assert found["ratio"] == found["tuning_full"]["ratio"] == {"time": 0.25, "memory": 0.25}
    assert [Path(one[0]).name for one in commands[1::2]] == ["trl_groups.py"] * 2
    assert all('"dtype":"float32"' in one[2] for one in commands[::2])
    assert [one[1:] for one in commands[1::2]] == [
        ["grpo", "100m", tuning, "1", "3", "float32"] for tuning in ("lora", "full")
    ]
    assert '"algorithm":"grpo"' in commands[0][2]


def test_the_work_is_as_long_as_it_says(run_cli: RunCli, tmp_path: Path) -> None:
    """16 prompts of 128 tokens, with answers of 64: both sides do the same work."""
    content = work.recipe("100m", "lora", "all", 4, checkpointing=False)
    assert (content["rl"]["max_prompt_length"], content["rl"]["max_new_tokens"]) == (128, 64)
    assert content["rl"]["epochs"] == 4
    groups = work.recipe("100m", "lora", "all", 1, checkpointing=False, algorithm="grpo")["rl"]
    assert (groups["prompts_per_step"], groups["samples_per_prompt"]) == (4, 4)
    for wrong, expected in (
        (["--layers", "some"], "--layers: 'some' is not one of all, top-half"),
        (["--model", "2b"], "--model: '2b' is not one of 100m, 1b, 8b"),
        (["limit", "--epochs", "1"], "--epochs: bench limit does not use this option"),
        (["--figure", "x.svg"], "it is for bench growth"),
        (["--algorithm", "dpo"], "--algorithm: 'dpo' is not one of ppo, rloo, grpo"),
        (["--algorithm", "rloo", "--peer-trl", str(tmp_path)], "for rloo the installed TRL is the peer"),
        (["--peer-trl", str(tmp_path)], "pip install --no-deps --target DIR trl==1.12.0"),
    ):
        code, text = run_cli("bench", *wrong)
        assert code == 2
        assert expected in " ".join(text.split())


@pytest.mark.parametrize(
    ("part", "option", "expected"),
    [
        ("step", "figure", "--figure: bench step does not use this option Leave it out; it is for bench growth."),
        ("limit", "epochs", "--epochs: bench limit does not use this option Leave it out; it is for bench step."),
        ("rollout", "peer_trl", "--peer-trl: bench rollout does not use this option"),
        (
            "reward",
            "layers",
            "--layers: bench reward does not use this option Leave it out; it is for bench step, limit.",
        ),
        ("growth", "repeats", "it is for bench step, rollout, reward."),
    ],
)
def test_an_option_that_a_part_would_ignore_is_refused(part: str, option: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        command.refuse_unread(part, ["part", *command.READS[part], option, "json_file"])
    assert expected in " ".join(str(caught.value).split())
    command.refuse_unread(part, ["part", *command.READS[part], "json_file"])


def test_what_a_part_reads_is_what_it_is_given() -> None:
    for part, options in command.READS.items():
        run = command.bench_step if part == "step" else command.measure_of(part)
        assert {*signature(run).parameters} - {"json_file"} == {*options}


@pytest.mark.parametrize("arguments", [["rollout"], ["--peer-trl", "PEER"]])
def test_without_a_checkout_what_is_only_there_is_refused_before_anything_is_measured(
    arguments: list[str], run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trl" / "experimental" / "ppo").mkdir(parents=True)
    monkeypatch.setattr(command, "SCRIPTS", tmp_path / "benchmarks")
    code, text = run_cli("bench", *(str(tmp_path) if one == "PEER" else one for one in arguments))
    assert code == 2
    said = " ".join(text.split())
    assert "this measurement needs a checkout, and perl-rlhf is installed without one" in said
    assert "pip install --editable ." in said


def test_a_part_is_measured_and_says_so_if_its_figures_cannot_be_written(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(work.MODELS, "100m", LLAMA)
    file = tmp_path / "gone" / "bench.json"
    code, text = run_cli("bench", "rollout", "--repeats", "1", "--json", str(file))
    assert code == 2
    assert '"four answers a prompt"' in text
    assert "cannot be written: No such file or directory" in " ".join(text.split())
    assert "Traceback" not in text


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(UserError, match="bench ours: the measurement failed: ValueError: no recipe"):
        command._measure("ours", ["-c", "raise ValueError('no recipe')"])


def test_the_peak_is_what_was_held_beyond_the_start() -> None:
    with PeakOverStart() as peak:
        held = bytearray(200 * 2**20)
        for place in range(0, len(held), 4096):
            held[place] = 1
        peak._stop.wait(0.1)
        del held
    assert 190 * 2**20 < peak.bytes < 400 * 2**20
