"""Best-of-n as a baseline: its estimator against all subsets, and its entry in a run's report."""

import itertools
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from perl.data.records import Prompt, Turn
from perl.rl import best_of_n
from perl.rl.best_of_n import best_of_n_kl, chances_of_best
from perl.rl.rollout import EncodedPrompts
from perl.roles.role import Role
from tests.conftest import RunCli, WriteRecipe


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    rewards = sorted([0.3, -1.0, 2.5, 0.7, 0.1, 4.0])
    subsets = [max(some) for some in itertools.combinations(rewards, n)]
    assert float(np.array(rewards) @ chances_of_best(6, n)) == pytest.approx(statistics.fmean(subsets))
    assert chances_of_best(6, n).sum() == pytest.approx(1.0)


def test_the_kl_is_that_of_the_distribution_of_the_best() -> None:
    # Of a uniform reward on [0, 1] the best of n has the density n xⁿ⁻¹: its KL is the integral of p log p.
    x = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = 4 * x**3
    assert float((density * np.log(density)).mean()) == pytest.approx(best_of_n_kl(4), abs=1e-4)
    assert best_of_n_kl(1) == 0.0


@pytest.mark.parametrize(("n", "prompts"), [(2, 40), (8, 32), (64, 16)])
def test_it_costs_about_as_many_completions_as_an_evaluation(
    n: int, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [Prompt((Turn("text", str(k)),), str(k)) for k in range(40)]
    asked = EncodedPrompts(every, ids=[[k] for k in range(40)], groups=list(range(40)))
    drawn: list[int] = []

    def rollouts(collector: Any, role: Any, prompts: EncodedPrompts, generator: Any) -> list[Any]:
        drawn.append(len(prompts))
        return [SimpleNamespace(rewards_B=torch.arange(len(prompts)))]

    monkeypatch.setattr(best_of_n, "rollouts", rollouts)
    found = best_of_n.best_of_n(MagicMock(), Role.BASE, asked, None, n, {"reward": [0.0] * 40})
    assert drawn == [n * prompts]
    assert {one.prompts for one in found} == {prompts}


def test_a_run_reports_best_of_n_beside_its_policy(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text = run_cli("run", write_recipe(reward=None), "--out", out, "rl.best_of_n=4")
    assert code == 0, text
    found = json.loads((out / "report.json").read_text())["stages"]["rl"]["eval"]
    assert [one["n"] for one in found["best_of_n"]] == [2, 4]
    assert [one["kl"] for one in found["best_of_n"]] == pytest.approx([math.log(2) - 0.5, math.log(4) - 0.75])
    assert found["best_of_n"][0]["reward"] <= found["best_of_n"][1]["reward"]
    assert found["best_of_n"][0]["rl_reward"] == pytest.approx(found["reward_after"])
    assert "Compared with the best of 2 completions before RL" in " ".join(text.split())
    assert "Compared with the best of 2 completions" in (out / "report.html").read_text()
    code, text = run_cli("run", write_recipe(reward=None), "--out", tmp_path / "off", "rl.best_of_n=0")
    assert code == 0, text
    assert "best_of_n" not in json.loads((tmp_path / "off" / "report.json").read_text())["stages"]["rl"]["eval"]
