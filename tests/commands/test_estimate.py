"""`estimate`: whether a recipe fits, changes that make it fit, and sizes as people write them."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from perl.commands.estimate import SHORT, _say_seconds, _table, parse_bytes
from perl.commands.estimate_workers import Workers, share
from perl.errors import InternalError, UserError
from perl.predict import TRY, Trial, trial_session
from perl.predict.device import Device
from perl.recipe import load_recipe
from tests.conftest import RunCli, WriteRecipe
from tests.encoder_decoders import tiny_t5

REWARD = {"batch_size": 4, "max_length": 64}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("80GiB", 80 * 2**30),
        ("1.5e9", 1_500_000_000),
        (" 16 gb", 16 * 10**9),
        ("512Mi", 512 * 2**20),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "24 Gigs", "1e400", "nan", "1..5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_bytes(text)


def test_a_size_without_its_unit_is_asked_for_at_once() -> None:
    with pytest.raises(UserError, match=r"'24' is 24 bytes\n  Write 24GB."):
        parse_bytes("24")


def test_a_bug_in_a_process_is_one_message_with_its_traceback_in_a_file(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = load_recipe(write_recipe(sft=None, rl=None))
    with Workers(1) as workers:
        workers.subject = cast(Any, "no subject")
        with pytest.raises(InternalError) as raised:
            list(workers.in_turn({"lora": recipe}))
    (file,) = tmp_path.glob("perl-rlhf-estimate-*.txt")
    assert str(raised.value).startswith("estimate of reward, tuning lora: AttributeError: 'str' object has no")
    assert str(file) in str(raised.value)
    assert "perl/predict/" in file.read_text()


def estimated(run_cli: RunCli, recipe: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    file = recipe.parent / "estimate.json"
    code, text = run_cli("estimate", str(recipe), *arguments, "--json", str(file))
    assert code == 0, text
    return json.loads(file.read_text()), " ".join(text.split())


def peak(stages: dict[str, Any]) -> int:
    return max(phase["peak"] for memory in stages.values() for phase in memory.values())


def test_it_says_what_would_make_it_fit(run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path) -> None:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    recipe = write_recipe(data=data, rl=None, reward=REWARD)
    found, text = estimated(run_cli, recipe, "--device-memory", "1MB")
    assert found["fits"] is False
    assert "It does not fit" in text
    assert set(found["lora"]) == set(found["full"]) == {"reward"}
    changes = found["changes"]
    together = list(changes)[-1]
    assert "checkpoint_activations=true" in changes
    assert "lora.layers=top-half" in changes
    assert "reward.batch_size=1" in changes
    # Each needs less than the unchanged recipe, and all together need the least.
    assert all(change["peak"] < peak(found["lora"]) for change in changes.values())
    assert changes[together]["peak"] == min(change["peak"] for change in changes.values())
    # The estimate equals the memory of a real step.
    with trial_session(load_recipe(recipe), Trial(2)) as session:
        measured = TRY["reward"](session).memory
    for name, phase in found["lora"]["reward"].items():
        assert phase["peak"] == pytest.approx(measured[name].peak, rel=0.05)


def test_a_tuning_that_the_recipe_cannot_have_is_left_out(run_cli: RunCli, write_recipe: WriteRecipe) -> None:
    rl = {"algorithm": "trpo", "reward": {"function": "rewards.py:length"}, "max_new_tokens": 4}
    found, text = estimated(run_cli, write_recipe(reward=None, rl=rl))
    assert set(found) == {"name", "devices", "basis", "lora", "seconds", "hours"}
    assert "full is left out: rl.trust_region keeps the policy's weights" in text


def test_an_encoder_decoder_is_not_said_to_fit_in_four_bits(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    base = {"model": str(tiny_t5(tmp_path / "t5")), "dtype": "float32"}
    found, _ = estimated(
        run_cli, write_recipe(data=data, base=base, rl=None, reward=REWARD), "--device-memory", "1MB"
    )
    assert "reward.batch_size=1" in found["changes"]
    assert not any("4bit" in change for change in found["changes"])


def test_devices_share_weights_and_batches(run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path) -> None:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    recipe = write_recipe(data=data, tuning="full", reward=REWARD, rl=None)
    one, _ = estimated(run_cli, recipe)
    four, text = estimated(run_cli, recipe, "--devices", "4", "--device-memory", "24GB")
    assert four["fits"] is True
    assert "changes" not in four
    assert four["devices"] == 4
    assert "each of 4 devices" in text
    weights = [found["full"]["reward"]["update"]["kinds"]["base_weights"] for found in (one, four)]
    assert weights[1] == pytest.approx(weights[0] / 4, rel=0.01)
    assert peak(four["full"]) < peak(one["full"])


def test_a_device_may_have_a_single_completion() -> None:
    """A single completion is refused because it cannot be compared; one per device on 64 devices is not."""
    rl = share(load_recipe("recipes/measure-8b.yaml"), 64).rl
    assert rl is not None
    assert (rl.prompts_per_step, rl.micro_batch_size) == (1, 1)


def test_seconds_hours_and_money(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(mixed_data.parent / "cache"))
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    recipe = write_recipe(data=data, rl=None, reward=REWARD)
    slow, text = estimated(run_cli, recipe, "--price", "2")
    assert "cpu" in text
    assert "This is a prediction" in text
    for tuning, hours in slow["hours"].items():
        (stage,) = slow["seconds"][tuning].values()
        assert hours == pytest.approx((stage["training"] + stage["evaluation"]) / 3600)
        assert slow["cost"][tuning] == 2 * hours
        assert 0 < stage["update"] < stage["training"]
    fast, text = estimated(run_cli, recipe, "--device", "h100")
    assert "is assumed, not measured" in text
    assert "assumed" in fast["basis"]
    assert "cost" not in fast
    assert fast["hours"]["full"] < slow["hours"]["full"]


def test_no_number_of_the_table_is_cut_off_in_80_columns() -> None:
    """That is the width of a log file: rich cut `80.0 MB` to `80.0 …`, which may be anything."""
    phase = SimpleNamespace(peak=888_800_000, kinds=dict.fromkeys(SHORT, 88_800_000))
    prediction = cast(Any, {"reward": {"generate": phase, "update": phase}})
    console = Console(width=80, file=io.StringIO())
    console.print(_table("r", prediction, 1, None))
    written = cast(io.StringIO, console.file).getvalue()
    assert "…" not in written
    assert written.replace("\xa0", " ").count("88.8 MB") == 2 * len(SHORT)


def test_what_the_total_leaves_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for name, devices, left_out in (
        ("arithmetic", 1, "training the tiny base."),
        ("quickstart", 2, "communication between devices."),
        ("arithmetic", 2, "communication between devices and training the tiny base."),
    ):
        speed = cast(Device, SimpleNamespace(name="cpu", basis="none"))
        _say_seconds(load_recipe(f"recipes/{name}.yaml"), {}, speed, devices, None)
        captured = capsys.readouterr()
        assert f", without {left_out}" in " ".join((captured.out + captured.err).split())


def test_what_it_cannot_use_is_refused(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(rl=None)
    for arguments, expected in (
        ([str(recipe), "--device-memory", "much"], "--device-memory: 'much' is not a size"),
        ([str(recipe), "--json", str(tmp_path / "no" / "folder" / "x.json")], "cannot be written"),
        ([str(tmp_path / "none.yaml")], "no such recipe"),
        ([str(recipe), "base.model=/no/model"], "/no/model"),
        ([str(recipe), "--devices", "0"], "--devices"),
        ([str(recipe), "--device", "b9000"], "--device: unknown device 'b9000'"),
        ([str(recipe), "--device", "h100", "--calibrate"], "--device: --calibrate measures this machine"),
        ([str(recipe), "--price", "-1"], "--price"),
    ):
        code, text = run_cli("estimate", *arguments)
        assert code == 2, text
        assert expected in " ".join(text.split())
        assert "Traceback" not in text
