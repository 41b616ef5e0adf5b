"""`sweep`: one stage with several settings on one base; the files it writes, and refused inputs."""

import html
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft.tuners.lora import LoraLayer
from scipy import stats

from perl.recipe import load_recipe
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.stages.pipeline import TRAIN
from perl.stages.session import Session
from perl.stages.training import NotFiniteError
from perl.sweep.cells import Cells
from tests.conftest import RunCli, WriteRecipe
from tests.tiny import lora, random_llama

RL = {
    "steps": 5,
    "prompts_per_step": 4,
    "micro_batch_size": 4,
    "max_new_tokens": 4,
    "eval_prompts": 2,
    "algorithm": "reinforce",
    "critic": "none",
}


@pytest.fixture
def recipe(write_recipe: WriteRecipe) -> Path:
    """Write a recipe with all stages; a sweep of the reward model skips SFT and RL."""
    reward = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "max_length": 64}
    return write_recipe(sft={"batch_size": 4, "max_length": 64}, reward=reward)


def metrics_of(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    reward = report["stages"]["reward"]
    return {"recorded": reward["recorded"], "auroc": reward["eval"]["auroc"], "base": report["base"]}


def test_every_setting_is_trained_and_told(run_cli: RunCli, recipe: Path, tmp_path: Path) -> None:
    """The last of several runs on one base has the same scores as a separate run."""
    out = tmp_path / "out"
    kinds = ("--kinds", "lora,miss:2@mlp,full", "--ranks", "1,2", "--targets", "attention")
    code, text = run_cli("sweep", recipe, *kinds, "--seeds", "0,3", "--out", out)
    assert code == 0, text
    table = text.partition("95 % interval over")[2]
    assert "miss on mlp, rank 2" in " ".join(table.split())
    assert "…" not in table  # no column is cut off
    names = ("full", "lora-attention-1", "lora-attention-2", "miss-mlp-2")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        f"{n}-{s}" for n in names for s in (0, 3)
    ]
    for name, overrides in (
        ("lora-attention-2-3", ["lora.rank=2", "lora.targets=attention"]),
        ("miss-mlp-2-3", ["lora=null", "adapter={kind: miss, rank: 2, targets: mlp}"]),
        ("full-3", ["tuning=full", "reward.learning_rate=1e-4"]),
    ):
        alone = tmp_path / name
        code, text = run_cli("run", recipe, "seed=3", "sft=null", "rl=null", *overrides, "--out", alone)
        assert code == 0, text
        assert metrics_of(out / name) == metrics_of(alone)
    assert metrics_of(out / "lora-attention-1-0")["recorded"] != metrics_of(out / "lora-attention-2-0")["recorded"]
    _check_table(out)


def _check_table(out: Path) -> None:
    found = json.loads((out / "sweep.json").read_text())
    assert found["seeds"] == [0, 3]
    assert [row["name"] for row in found["rows"]] == ["lora-attention-1", "lora-attention-2", "miss-mlp-2", "full"]
    one, two, miss, full = found["rows"]
    # A head of 32; in each of two blocks, four projections of 32 by 32, with 64 weights per rank.
    assert one["trained_weights"] == 32 + 2 * 4 * 64
    assert two["trained_weights"] == 32 + 2 * 2 * 4 * 64
    assert miss["trained_weights"] == 32 + 2 * 2 * (64 + 64 + 32)  # a rank has a weight for each output
    aurocs = np.array([metrics_of(out / f"lora-attention-1-{seed}")["auroc"] for seed in (0, 3)])
    fulls = np.array([metrics_of(out / f"full-{seed}")["auroc"] for seed in (0, 3)])
    assert one["AUROC"]["mean"] == pytest.approx(aurocs.mean())
    assert one["difference"] is None
    differences = fulls - aurocs
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert full["difference"]["interval"] == pytest.approx(list(expected), nan_ok=True)
    page = html.unescape((out / "report.html").read_text())
    assert page.count("<svg") == 1
    assert all(sentence in page for sentence in found["sentences"])
    assert sum(sentence.count("to") for sentence in found["sentences"]) >= 3  # an interval for each but the first


def test_rates_are_searched_on_seeds_that_are_not_reported(
    run_cli: RunCli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid is cut to its first three rates, because its range does not matter here."""
    monkeypatch.setattr("perl.measure.rate_search.MOST", 1)
    out = tmp_path / "out"
    narrow = ("--ranks", "1", "--targets", "attention", "--seeds", "0", "--search-rates", "--out", out)
    code, text = run_cli("sweep", recipe, *narrow)
    assert code == 0, text
    tried = {path.name for path in out.glob("*-1")}
    assert tried == {
        *(f"lora-attention-1-lr{rate}-1" for rate in ("0.00032", "0.001", "0.0032")),
        *(f"full-lr{rate}-1" for rate in ("3.2e-05", "0.0001", "0.00032")),
    }
    found = json.loads((out / "sweep.json").read_text())
    assert found["rates_searched_on"] == [1]
    for row in found["rows"]:
        assert (out / f"{row['name']}-lr{row['rate']:g}-0" / "report.json").exists()
    assert "Best learning rate" in found["sentences"][-1]
    assert "one seed" in found["sentences"][-1]
    made = (out / "full-lr0.0001-1" / "report.json").stat().st_mtime_ns
    code, text = run_cli("sweep", recipe, *narrow)
    assert code == 0, text
    assert text.count("is finished in") == 8, "three rates and the best one, on both sides"
    assert (out / "full-lr0.0001-1" / "report.json").stat().st_mtime_ns == made


def test_rl_alone_varies(run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path) -> None:
    """All kinds of adapters and full tuning share one SFT policy, merged into the base, and one reward model."""
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    supervised = {"batch_size": 4, "max_length": 64, "learning_rate": 0.01}
    recipe = write_recipe(data=data, sft=supervised, reward={**supervised}, rl=RL)
    out = tmp_path / "out"
    code, text = run_cli("sweep", recipe, "--stage", "rl", "lora=null", "adapter={kind: prefix}", "--out", out)
    assert code == 2, text
    assert "cannot be merged into the base" in " ".join(text.split())
    assert not out.exists()
    code, text = run_cli(
        "sweep", recipe, "--stage", "rl", "--kinds", "ia3,lora,full", "--seeds", "0", "--kl", "0.1", "--out", out
    )
    assert code == 0, text
    reports = {
        name: json.loads((out / f"{name}-0" / "report.json").read_text()) for name in ("ia3", "lora", "full")
    }
    earlier = json.loads((out / "earlier-0" / "report.json").read_text())
    assert set(earlier["stages"]) == {"sft", "reward"}
    bases = {report["base"]["sha256_before"] for report in reports.values()}
    assert len(bases) == 1
    assert bases != {earlier["base"]["sha256_before"]}  # it includes the SFT policy's training
    before = {report["stages"]["rl"]["eval"]["reward_before"] for report in reports.values()}
    assert len(before) == 1
    weights = {name: report["stages"]["rl"]["trainable_parameters"] for name, report in reports.items()}
    assert weights["ia3"] < weights["lora"] < weights["full"]
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["ia3", "lora", "full"]
    assert all(np.isfinite(row["reward at KL"]["mean"]) for row in rows)
    code, text = run_cli("sweep", recipe, "--stage", "rl", "sft.epochs=2", "--kinds", "ia3", "--out", out)
    assert code == 2, text
    assert "earlier-0: contains another run: there sft.epochs is 1, here 2" in " ".join(text.split())


@pytest.mark.usefixtures("drawn_plots")
def test_settings_of_equal_weights(run_cli: RunCli, recipe: Path, tmp_path: Path) -> None:
    """One rank on attention has 4 · 64 weights per block, one on the MLP 3 · 96, so ranks 9 and 8 are equal."""
    out = tmp_path / "out"
    kinds = ("--kinds", "lora", "--ranks", "9", "--targets", "attention,mlp")
    code, text = run_cli("sweep", recipe, *kinds, "--equal-weights", "--seeds", "0", "--out", out)
    assert code == 0, text
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["targets"], row["size"]) for row in rows] == [("attention", 9), ("mlp", 8)]
    assert rows[0]["trained_weights"] == rows[1]["trained_weights"] == 32 + 2 * 9 * 4 * 64


def test_training_that_diverged_is_not_tried_again(
    run_cli: RunCli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def diverge(session: Session) -> None:
        calls.append(1)
        raise NotFiniteError("the loss was not finite", where="stage of reward", remedy="Lower its learning_rate.")

    monkeypatch.setitem(TRAIN, "reward", diverge)
    command = ("sweep", recipe, "--kinds", "lora", "--seeds", "0", "--out", tmp_path / "out")
    for _ in range(2):
        code, text = run_cli(*command)
        assert code == 0, text
        assert "lora is left out because its training diverged on every seed" in " ".join(text.split())
    assert len(calls) == 1
    assert run_cli(*command, "reward.learning_rate=1e-4")[0] == 0  # as the error advises
    assert len(calls) == 2


def test_changed_data_are_not_mixed_with_earlier_results(
    run_cli: RunCli, recipe: Path, small_data: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "ratings.jsonl", tmp_path / "out"
    shutil.copyfile(small_data / "ratings.jsonl", data)
    command = ("sweep", recipe, f"data.path={data}", "--ranks", "1", "--seeds", "0", "--out", out, "--kinds")
    code, text = run_cli(*command, "lora")
    assert code == 0, text
    before = (out / "sweep.json").read_bytes()
    rows = data.read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:-1]))
    code, text = run_cli(*command, "miss,lora")
    assert code == 2, text
    words = " ".join(text.split())
    assert "since reward was trained here, the data have changed (1 row removed)" in words
    assert "use another --out; there, the sweep trains every setting again." in words, "`sweep` has no --from"
    assert (out / "sweep.json").read_bytes() == before
    assert not (out / "miss-1-0").exists()


def test_it_goes_on_where_it_stopped(run_cli: RunCli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    narrow = ("--kinds", "lora", "--seeds", "0", "--out", out)
    assert run_cli("sweep", recipe, "--ranks", "1", *narrow)[0] == 0
    before = (out / "lora-1-0" / "report.json").stat().st_mtime_ns
    code, text = run_cli("sweep", recipe, "--ranks", "1,2", *narrow)
    assert code == 0, text
    assert (out / "lora-1-0" / "report.json").stat().st_mtime_ns == before
    found = json.loads((out / "sweep.json").read_text())
    assert [row["size"] for row in found["rows"]] == [1, 2]
    assert "may be chance" in found["sentences"][0]
    code, text = run_cli("sweep", recipe, "reward.epochs=2", "--ranks", "1", *narrow)
    assert code == 2, text
    assert "there reward.epochs is 1, here 2" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "4,0"], "--ranks: 0 is too small"),
        (["--ranks", "4,four"], "--ranks: 'four' is not a number"),
        (["--ranks", "4,2,4"], "--ranks: 4 is given twice"),
        (["--targets", "lm"], "targets"),
        (["--kinds", "lora,ia4"], "no adapter kind 'ia4'"),
        (["--kinds", "ia3:4"], "ia3 has no size to set"),
        (["--kinds", "prefix@attention"], "prefix has no targets to set"),
        (["--kinds", "pissa"], "kind pissa is not supported"),
        (["--kinds", "full:2"], "full has no size to set"),
        (["--kinds", "lora:"], "'lora:' is not a kind of adapters"),
        (["--kinds", "lora:2,lora", "--ranks", "2"], "lora, rank 2 is given twice"),
        (["--seeds", "0,0"], "--seeds: 0 is given twice"),
        (["--seeds", "-1"], "--seeds: -1 is too small"),
        (["--seeds", "4294967296"], "--seeds: 4294967296 is too large"),
        (
            ["--stage", "rl", "sft=null", "rl.steps=5", "rl.algorithm=trpo"],
            "Set tuning: lora, or another rl.algorithm",
        ),
        (
            [
                "--stage",
                "rl",
                "sft=null",
                "rl.steps=5",
                "reward.members=2",
                "rl.reward={kind: model, combine: min}",
            ],
            "rl.reward: a sweep of RL uses the reward model of a separate run",
        ),
        (["--search-rates", "--search-seeds", "2"], "--search-seeds: 2 is also a reported seed"),
        (["--kinds", "full,lora", "--equal-weights"], "Name a kind of adapters first"),
        (["--stage", "rl"], "1 step: too few for a curve"),
        (["tuning=full"], "tuning: the recipe is for full tuning"),
        (["base.quantization=4bit"], "Leave it out: --kinds lora"),
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


def test_what_chooses_between_policies_may_be_the_reward_model(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    rl = {**RL, "reward": {"function": "rewards.py:length"}, "eval_steps": 2, "eval_reward": {"kind": "model"}}
    alone = Cells(load_recipe(write_recipe(rl=rl)), "rl", tmp_path).alone(0)
    assert alone.stages == ("rl",)
    assert alone.rl is not None
    assert [part.run for part in alone.rl.eval_reward_parts] == [str(tmp_path / "earlier-0")]  # type: ignore[attr-defined]
