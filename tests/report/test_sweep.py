"""A sweep's statements on its settings: intervals over seeds, and a direction only if they exclude zero."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from perl.measure.rate_search import BestRates
from perl.report.numbers import spread
from perl.report.quality import QUALITIES
from perl.report.runs import Run, read_run
from perl.report.sweep import Cell, Sweep
from perl.sweep.setting import Setting
from tests.report.made import make_run

FIRST, BETTER, SAME = Setting("lora"), Setting("dora"), Setting("lora", "mlp", 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run"))


def of_auroc(run: Run, auroc: float) -> Run:
    """Return the run with another AUROC, for a reward model trained on thumbs."""
    stages = run.report.stages
    assert stages.reward is not None
    card = replace(stages.reward.eval, auroc=auroc, compared=False)
    stages = replace(stages, reward=replace(stages.reward, eval=card))
    return replace(run, report=replace(run.report, stages=stages))


def cell(
    run: Run, setting: Setting, aurocs: list[float], rates: tuple[float, ...] = (), edge: bool = False
) -> Cell:
    runs = {seed: of_auroc(run, auroc) for seed, auroc in enumerate(aurocs)}
    return Cell(setting, runs, BestRates(rates, edge) if rates else None)


def test_the_interval_of_a_mean_is_students() -> None:
    values = [0.71, 0.75, 0.74, 0.69]
    found = spread(values)
    assert found is not None
    assert found.interval == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))
    single = spread([0.7])
    assert single is not None
    assert single.interval is None


def test_a_direction_is_said_only_where_the_interval_excludes_zero(run: Run) -> None:
    """Pairing by seed: one setting is ahead on every seed by less than the spread between seeds."""
    first = cell(run, FIRST, [0.80, 0.85, 0.90], (1e-3, 1e-3, 1e-3))
    better = cell(run, BETTER, [0.81, 0.862, 0.909], (8e-3, 1e-2, 1.25e-2), edge=True)
    same = cell(run, SAME, [0.83, 0.84, 0.88], (5e-4, 1e-3, 2e-3))
    sweep = Sweep("made", "reward", (0, 1, 2), (3, 4, 5), (first, better, same))
    difference = stats.ttest_1samp([0.01, 0.012, 0.009], 0).confidence_interval(0.95)
    shown, unclear, rate, rate_unclear = sweep.sentences
    assert shown == f"AUROC compared with lora, higher: dora ({difference.low:+.3f} to {difference.high:+.3f})."
    assert unclear.startswith("AUROC compared with lora, no difference shown: lora on mlp, rank 4 (−")
    ends = 10 ** np.array(stats.ttest_1samp(np.log10([8, 10, 12.5]), 0).confidence_interval(0.95))
    words = f"10 times, {ends[0]:.2g} to {ends[1]:.2g}, at the edge of the search"
    assert rate == f"Best learning rate compared with lora, higher: dora ({words})."
    assert "no difference shown: lora on mlp, rank 4 (1 times" in rate_unclear
    assert json.loads(json.dumps(sweep.as_json()))["rows"][1]["difference"]["mean"] == pytest.approx(0.031 / 3)
    assert [sweep.columns["rate"](one) for one in (first, better)] == ["0.001", "0.001 (edge)"], (
        "not the recipe's auto"
    )


def test_a_seed_that_diverged_is_left_out_of_the_pairs(run: Run) -> None:
    first = cell(run, FIRST, [0.80, 0.85, 0.90])
    other = Cell(BETTER, {seed: of_auroc(run, value) for seed, value in ((0, 0.7), (2, 0.8))})
    found = Sweep("made", "reward", (0, 1, 2), (), (first, other)).difference(other)
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(-0.1), 2)


def test_rl_is_judged_where_its_kl_is_first_reached_or_at_its_end(run: Run, tmp_path: Path) -> None:
    """The gold score rises with the step number, the KL with a hundredth of it; both are smoothed."""
    steps = np.arange(1.0, 41.0)
    made = replace(run, metrics={"policy": {"kl": steps / 100, "reward": steps, "gold": 2 * steps}})
    gold, reward, _ = QUALITIES["rl"]
    assert gold.value(made, 0.2) == pytest.approx(40)
    assert reward.value(made, 0.2) == pytest.approx(20)
    assert reward.value(made, math.inf) == pytest.approx(39)  # the mean of the last three steps
    slow = replace(made, metrics={"policy": {**made.metrics["policy"], "kl": steps / 1000}})
    sweep = Sweep("made", "rl", (0,), (), (Cell(FIRST, {0: made}), Cell(SAME, {0: slow})), at=0.2)
    assert "1 of 2 runs stay below it" in sweep.reached
    matched = replace(sweep, at=None)
    assert matched.kl == pytest.approx(0.039)  # the largest that both reached


def test_the_seconds_of_a_step_are_those_of_one_member(run: Run) -> None:
    recipe = {**run.recipe, "reward": {**run.section("reward"), "members": 2}}
    ensemble = Cell(FIRST, {0: replace(run, recipe_yaml=yaml.safe_dump(recipe))})
    sweep = Sweep("made", "reward", (0,), (), (ensemble,))
    assert sweep.seconds(ensemble) == pytest.approx(sweep.seconds(Cell(FIRST, {0: run})) / 2)
