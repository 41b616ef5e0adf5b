"""`compare` and `report`: both tunings of one recipe side by side, and refused inputs."""

import contextlib
import json
import re
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perl.recipe import Recipe, load_recipe
from perl.stages.pipeline import run
from perl.sweep.setting import variant
from tests import forks
from tests.conftest import RunCli, WriteRecipe

STAGES = {
    "sft": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "max_length": 64},
    "reward": {"batch_size": 4, "learning_rate": 1e-3, "max_length": 64},
    "rl": {"steps": 3, "prompts_per_step": 4, "micro_batch_size": 4, "max_new_tokens": 8, "eval_prompts": 3},
}


@pytest.fixture
def recipe(write_recipe: WriteRecipe, mixed_data: Path) -> Path:
    return write_recipe(data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}, **STAGES)


def test_full_tuning_is_the_same_recipe_conventionally(recipe: Path) -> None:
    """It has a tenth of the learning rates and a separate critic; data, batches, seeds and losses are the same."""
    lora = load_recipe(recipe, ["rl.critic=shared", "rl.learning_rate=0.01"])
    full = variant(lora, "full", 3)
    assert (full.tuning, full.seed, full.critic) == ("full", 3, "adapter")
    kept = full.model_dump() | {"tuning": "lora", "seed": 0}
    for stage in ("sft", "reward", "rl"):
        assert kept[stage]["learning_rate"] == pytest.approx(0.1 * lora.model_dump()[stage]["learning_rate"])
        kept[stage]["learning_rate"] = lora.model_dump()[stage]["learning_rate"]
    kept["rl"]["critic"] = "shared"
    assert Recipe.model_validate(kept) == lora
    assert variant(lora, "lora", 0) == lora


def test_a_recipe_for_full_tuning_is_compared_at_its_own_rate(recipe: Path) -> None:
    """The ratio of the two rates is the same as for the same recipe under LoRA."""
    overrides = ["tuning=full", "sft.learning_rate=1e-4", "reward.learning_rate=0.5", "rl=null"]
    full = load_recipe(recipe, overrides)
    assert variant(full, "full", 0) == full
    lora = variant(full, "lora", 0)
    assert lora.sft is not None
    assert lora.sft.learning_rate == pytest.approx(1e-3)
    assert lora.reward is not None
    assert lora.reward.learning_rate == 1.0  # the largest that a recipe accepts


def test_a_rate_that_follows_the_tuning_by_itself_is_left_to_it(recipe: Path) -> None:
    full = variant(load_recipe(recipe, ["rl.learning_rate=auto"]), "full", 0)
    assert full.rl is not None
    assert full.rl.learning_rate == "auto"


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((folder / "compare.json").read_text())
    return {(row["stage"], row["figure"]): row for row in found["rows"]}


def test_both_tunings_are_run_and_compared(
    run_cli: RunCli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tuning runs in its own process, here a fork."""
    monkeypatch.setattr("perl.commands.compare_baselines.run_child", lambda words: forks.run(words).returncode)
    out = tmp_path / "out"
    code, text = run_cli("compare", str(recipe), "--out", str(out))
    assert code == 0, text
    runs = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert runs == ["full-0", "lora-0"]
    rows = rows_of(out)
    assert {stage for stage, _ in rows} == {"sft", "reward", "rl", "quality"}
    report = json.loads((out / "lora-0" / "report.json").read_text())
    for stage, result in report["stages"].items():
        for phase, predicted in result["predicted_memory"].items():
            assert predicted["peak"] == pytest.approx(result["memory"][phase]["peak"], rel=0.05), (stage, phase)
    page = (out / "report.html").read_text()
    assert "full tuning" in page
    assert 'src="http' not in page


@pytest.mark.parametrize(("ended_by", "code"), [(signal.SIGKILL, 1), (signal.SIGTERM, 130)])
def test_a_run_that_a_signal_ends_is_told(
    ended_by: int, code: int, run_cli: RunCli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.predict.predict", lambda *_: {})
    monkeypatch.setattr("perl.commands.compare_baselines.run_child", lambda _: -ended_by)
    status, written = run_cli("compare", recipe, "--out", tmp_path / "out")
    assert status == code
    words = " ".join(written.split())
    assert ("out/lora-0: the run was ended by SIGKILL" in words) == (code == 1), written
    assert "un the same command again" in words


def test_rates_are_searched_on_both_sides(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search uses the seed after the last; runs use its rates; the output says so. In-process for speed."""
    monkeypatch.setattr("perl.measure.rate_search.MOST", 1)
    monkeypatch.setattr("perl.commands.compare.run_apart", run)
    out = tmp_path / "out"
    recipe_file = write_recipe(reward={"epochs": 1, **STAGES["reward"]}, rl=None)
    code, text = run_cli("compare", recipe_file, "--search-rates", "--out", out)
    assert code == 0, text
    assert "Learning rates: searched for on both sides, with seed 1" in " ".join(text.split())
    found = json.loads((out / "compare.json").read_text())
    assert found["rates_searched_on"] == 1
    for tuning, rates in (("lora", (3.2e-4, 1e-3, 3.2e-3)), ("full", (3.2e-5, 1e-4, 3.2e-4))):
        tried = {
            float(path.name.split("-lr")[1].rpartition("-")[0]) for path in out.glob(f"rates/reward/{tuning}*-1")
        }
        assert tried == set(rates)
        recipe = load_recipe(out / f"{tuning}-0" / "recipe.yaml")
        assert recipe.reward is not None
        assert found["learning_rates"][tuning] == {"reward": recipe.reward.learning_rate}
        assert min(rates) <= recipe.reward.learning_rate <= max(rates)


def test_costs_alone_leave_no_runs(run_cli: RunCli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = run_cli("compare", str(recipe), "--steps", "3", "--out", str(out))
    assert code == 0, text
    assert "3 steps are too few to measure speed" in text
    assert text.count("(few steps)") == 3, "beside the ratios of speeds"
    assert re.findall(r"\d+/\d+", text) == ["3/3"] * 6, "the bars count the steps that are taken"
    assert [path.name for path in out.iterdir()] == ["compare.json"]
    rows = rows_of(out)
    assert set(rows) == {
        (stage, figure)
        for stage in ("sft", "reward", "rl")
        for figure in ("peak_memory_bytes", "tokens_per_second")
    }
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["lora"] / row["full"])
    assert rows["rl", "peak_memory_bytes"]["ratio"] < 1


def test_rl_is_compared_with_baselines_at_the_same_kl(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are evaluated on the same prompts; a second call trains nothing again."""
    monkeypatch.setattr("perl.commands.compare_baselines.run_apart", run)
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    rl = {**STAGES["rl"], "reward": {}, "learning_rate": 0.02}
    recipe, out = write_recipe(data=data, **STAGES | {"rl": rl}), tmp_path / "out"
    code, text = run_cli("compare", recipe, "--baselines", "kto,dpo:3e-3", "--out", out)
    assert code == 0, text
    found = json.loads((out / "compare.json").read_text())["baselines"]
    assert [(one["method"], one["learning_rate"]) for one in found] == [("kto", 1e-3), ("dpo", 3e-3)]
    report = json.loads((out / "lora-0" / "report.json").read_text())["stages"]["rl"]["eval"]
    for one in found:
        last, first = one["rl_policies"][-1], one["rl_policies"][0]
        assert (last["kl"], last["reward"]) == pytest.approx((report["kl"], report["reward_after"]))
        assert (first["kl"], first["reward"]) == pytest.approx((0.0, report["reward_before"]))
        assert one["policies"][0] == first
        ends = [max(policy["kl"] for policy in one[side]) for side in ("policies", "rl_policies")]
        assert one["kl"] == min(ends)
        differences = {row["metric"]: row for row in one["matched"]["differences"]}
        assert [differences["kl"][end] for end in ("first", "second")] == pytest.approx([one["kl"]] * 2)
    page = (out / "report.html").read_text()
    assert "Was RL worth it?" in page
    assert "DPO" in page

    def again(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("perl.baselines.comparison.train_baseline", again)
    code, text = run_cli("compare", recipe, "--baselines", "kto,dpo:3e-3", "--out", out)
    assert code == 0, text


def test_an_interrupted_measurement_goes_on_with_the_same_data(
    run_cli: RunCli, recipe: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copyfile(mixed_data, tmp_path / "rows.jsonl")
    tried: list[str] = []

    @contextlib.contextmanager
    def session(recipe: Recipe, _: object) -> Iterator[Recipe]:
        yield recipe

    def measure(stage: str, recipe: Recipe) -> SimpleNamespace:
        tried.append(f"{stage}, {recipe.tuning}")
        if len(tried) == 4:
            raise KeyboardInterrupt
        return SimpleNamespace(peak_memory_bytes=100 * len(tried), tokens_per_second=1.0)

    monkeypatch.setattr("perl.predict.trial_session", session)
    monkeypatch.setattr("perl.predict.TRY", {stage: partial(measure, stage) for stage in ("sft", "reward", "rl")})
    command = ("compare", recipe, f"data.path={data}", "--steps", "20", "--out", tmp_path / "out")
    status, written = run_cli(*command)
    assert status == 130
    assert "interrupted: finished stages are saved; run the same command again" in written
    status, written = run_cli(*command)
    assert status == 0, written
    assert "reward, lora, measured before" in written
    assert tried == ["sft, lora", "sft, full", "reward, lora", *["reward, full"] * 2, "rl, lora", "rl, full"]
    assert (
        rows_of(tmp_path / "out")["sft", "peak_memory_bytes"] | {"ratio": 0.5, "lora": 100, "full": 200}
        == (rows_of(tmp_path / "out")["sft", "peak_memory_bytes"])
    )
    assert "too few" not in written
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.json"]

    tried.clear()
    assert run_cli(*command)[0] == 130
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "One more", "completion": "row"}) + "\n")
    status, written = run_cli(*command)
    assert status == 0, written
    assert "measured before" not in written
    assert len(tried) == 4 + 6


def test_what_they_cannot_use_is_refused(run_cli: RunCli, recipe: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, expected in (
        (["compare", str(recipe), "--seeds", "0"], "--seeds"),
        (["compare", str(recipe), "--steps", "2"], "--steps"),
        (["compare", str(recipe), "--steps", "3", "--search-rates"], "Leave one of the two out"),
        (["compare", str(recipe), "--baselines", "ppo"], "not one of kto, dpo"),
        (["compare", str(recipe), "--baselines", "kto,kto"], "repeated"),
        (["compare", str(recipe), "--baselines", "dpo:fast"], "not a learning rate"),
        (["compare", str(recipe), "--baselines", "kto", "--search-rates"], "--baselines"),
        (["compare", str(recipe), "--baselines", "kto", "tuning=full"], "tuning: lora"),
        (["compare", str(recipe), "rl.steps=none"], "rl.steps"),
        (["compare", str(recipe), "base.model=/no/model", "--out", str(tmp_path / "o")], "/no/model"),
        (["report", str(empty)], str(empty)),
        (["report", str(tmp_path / "nothing")], "nothing"),
        (["report"], "RUN"),
    ):
        code, text = run_cli(*arguments)
        assert code == 2, text
        assert expected in " ".join(text.split()).replace("\n", "")
        assert "Traceback" not in text
    assert not (tmp_path / "o").exists()
