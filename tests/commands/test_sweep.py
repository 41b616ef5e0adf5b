"""`sweep`: reward models by rank and placement, on one base; what it writes, and what it refuses."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import LoraLayer

from perl.roles.roles import Role
from perl.roles.shared_base import SharedBase
from tests.conftest import RunCli, WriteRecipe
from tests.tiny import lora, random_llama


@pytest.fixture(autouse=True)
def _blank_plots() -> None:
    """A sweep's plots are drawn here alone."""


@pytest.fixture
def recipe(write_recipe: WriteRecipe) -> Path:
    """SFT and RL are left out by the sweep."""
    return write_recipe(sft={"batch_size": 4, "max_length": 64})


def metrics_of(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    reward = report["stages"]["reward"]
    return {"recorded": reward["recorded"], "auroc": reward["eval"]["auroc"], "base": report["base"]}


def test_every_setting_is_trained_and_told(run_cli: RunCli, recipe: Path, tmp_path: Path) -> None:
    """The last of several runs on one base has the scores of a run in a folder of its own."""
    out = tmp_path / "out"
    arguments = ("--ranks", "2,1", "--targets", "attention", "--seeds", "0,3", "--out", out)
    code, text = run_cli("sweep", recipe, *arguments)
    assert code == 0, text
    table = text.partition("mean ± standard deviation")[2]
    assert "attention" in table
    assert "…" not in table  # no column is cut off
    names = [f"{name}-{seed}" for name in ("attention-r1", "attention-r2", "full") for seed in (0, 3)]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == names
    for name, overrides in (
        ("attention-r2-3", ["lora.rank=2", "lora.targets=attention"]),
        ("full-3", ["tuning=full", "reward.learning_rate=1e-4"]),
    ):
        alone = tmp_path / name
        code, text = run_cli("run", recipe, "seed=3", "sft=null", "rl=null", *overrides, "--out", alone)
        assert code == 0, text
        assert metrics_of(out / name) == metrics_of(alone)
    assert metrics_of(out / "attention-r1-0")["recorded"] != metrics_of(out / "attention-r2-0")["recorded"]
    _check_table(out)


def _check_table(out: Path) -> None:
    found = json.loads((out / "sweep.json").read_text())
    assert found["seeds"] == [0, 3]
    assert [(row["targets"], row["rank"]) for row in found["rows"]] == [
        ("attention", 1),
        ("attention", 2),
        ("full", None),
    ]
    one, two, full = found["rows"]
    # A head of 32; in each of two blocks four projections of 32 by 32, a rank of which has 64 weights.
    assert one["trainable_parameters"] == 32 + 2 * 4 * 64
    assert two["trainable_parameters"] == 32 + 2 * 2 * 4 * 64
    for row in found["rows"]:
        assert row["trained_memory_bytes"] == pytest.approx(16 * row["trainable_parameters"], rel=1e-3)  # fp32
    aurocs = [metrics_of(out / f"attention-r1-{seed}")["auroc"] for seed in (0, 3)]
    fulls = [metrics_of(out / f"full-{seed}")["auroc"] for seed in (0, 3)]
    assert one["auroc"]["mean"] == pytest.approx(sum(aurocs) / 2)
    assert one["auroc"]["sd"] == pytest.approx(abs(aurocs[0] - aurocs[1]) / 2**0.5)
    assert one["less_full"]["mean"] == pytest.approx((sum(aurocs) - sum(fulls)) / 2)
    assert full["less_full"] is None
    page = html.unescape((out / "report.html").read_text())
    assert page.count("<svg") == 3  # AUROC, pairwise accuracy, accuracy
    assert found["bottom_line"] in page


def test_rates_are_searched_on_a_seed_that_is_not_reported(
    run_cli: RunCli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid is cut to its first three rates: nothing here is of how far it goes."""
    monkeypatch.setattr("perl.measure.rate_search.MOST", 1)
    out = tmp_path / "out"
    narrow = ("--ranks", "1", "--targets", "attention", "--seeds", "0", "--search-rates", "--out", out)
    code, text = run_cli("sweep", recipe, *narrow)
    assert code == 0, text
    tried = {path.name for path in out.glob("*-1")}
    assert tried == {
        *(f"attention-r1-lr{rate}-1" for rate in ("0.00032", "0.001", "0.0032")),
        *(f"full-lr{rate}-1" for rate in ("3.2e-05", "0.0001", "0.00032")),
    }
    lora, full = json.loads((out / "sweep.json").read_text())["rows"]
    for row, name in ((lora, "attention-r1"), (full, "full")):
        assert (out / f"{name}-lr{row['learning_rate']:g}-0" / "report.json").exists()
    made = (out / "full-lr0.0001-1" / "report.json").stat().st_mtime_ns
    assert run_cli("sweep", recipe, *narrow)[0] == 0
    assert (out / "full-lr0.0001-1" / "report.json").stat().st_mtime_ns == made


def test_it_goes_on_where_it_stopped(run_cli: RunCli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    narrow = ("--targets", "all-linear", "--seeds", "0", "--no-full", "--out", out)
    assert run_cli("sweep", recipe, "--ranks", "1", *narrow)[0] == 0
    before = (out / "all-linear-r1-0" / "report.json").stat().st_mtime_ns
    code, text = run_cli("sweep", recipe, "--ranks", "1,2", *narrow)
    assert code == 0, text
    assert (out / "all-linear-r1-0" / "report.json").stat().st_mtime_ns == before
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["rank"] for row in rows] == [1, 2]
    assert (rows[0]["auroc"]["sd"], rows[0]["less_full"]) == (None, None)
    code, text = run_cli("sweep", recipe, "reward.epochs=2", "--ranks", "1", *narrow)
    assert code == 2, text
    assert "there reward.epochs is 1, here 2" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "4,0"], "--ranks: 0 is too small"),
        (["--ranks", "4,four"], "--ranks: 'four' is not a number"),
        (["--ranks", ""], "--ranks: '' is not a number"),
        (["--ranks", "4,2,4"], "--ranks: 4 is there twice"),
        (["--targets", "mlp"], "--targets: 'mlp' is none of attention, all-linear"),
        (["--seeds", "0,0"], "--seeds: 0 is there twice"),
        (["--seeds", "-1"], "--seeds: -1 is too small"),
        (["tuning=full"], "tuning: the recipe is one for full tuning"),
        (["base.quantization=4bit"], "Leave full tuning out: --no-full"),
        (["reward=null"], "the recipe has no section reward"),
        (["lora.layers=[7]"], "lora.layers: no layer 7"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(
    run_cli: RunCli, recipe: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    code, text = run_cli("sweep", recipe, *arguments, "--out", tmp_path / "out")
    assert code == 2, text
    assert expected in " ".join(text.split())
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_adapters_are_taken_out_again() -> None:
    lm = random_llama()
    before, own = list(lm.named_modules()), set(vars(lm))
    roles = SharedBase(lora(lm, 2, 4))
    roles.add(Role.SFT)
    roles.add(Role.REWARD, head=True)
    assert any(isinstance(module, LoraLayer) for module in lm.modules())
    roles.adapter.remove()
    assert list(lm.named_modules()) == before
    assert set(vars(lm)) == own
