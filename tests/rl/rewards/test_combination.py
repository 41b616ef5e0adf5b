"""Several rewards at once: parts, weights, names, and their display."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perl.errors import UserError
from perl.rl.rewards import RewardSource
from perl.rl.rewards.combination import CombinedReward, Scores
from perl.rl.rewards.length import Length
from perl.rl.samplers.base import Samples
from tests.conftest import RunCli, WriteRecipe

LENGTHS = [3, 5, 9]
NUMBERS = st.floats(-1e6, 1e6)


class Given(RewardSource):
    """Returns the given rewards."""

    def __init__(self, name: str, returned: Any) -> None:
        self.name, self._returned = name, returned

    def rewards(self, prompts: object, samples: object, texts: Sequence[str]) -> Any:
        if isinstance(self._returned, Exception):
            raise self._returned
        return self._returned


def scores(*parts: tuple[RewardSource, float]) -> Scores:
    samples = cast(Samples, SimpleNamespace(ids_BL=torch.zeros(3, 1), completion_lengths=LENGTHS))
    return CombinedReward(parts)([], samples, ["a", "b", "c"])


@given(st.lists(st.tuples(st.lists(NUMBERS, min_size=3, max_size=3), NUMBERS), min_size=1, max_size=4))
def test_the_total_is_the_weighted_sum_and_the_parts_are_raw(given: list[tuple[list[float], float]]) -> None:
    found = scores(*((Given(f"{index}", rewards), weight) for index, (rewards, weight) in enumerate(given)))
    assert [part.tolist() for part in found.parts.values()] == [rewards for rewards, _ in given]
    for row, total in enumerate(found.total_B.tolist()):
        terms = [weight * rewards[row] for rewards, weight in given]
        assert total == pytest.approx(math.fsum(terms), rel=1e-12, abs=1e-9 * max(map(abs, terms), default=1))


def test_one_source_of_weight_1_is_the_reward_to_the_bit() -> None:
    rewards = [0.1, -1e30, 1 / 3]
    assert scores((Given("x", rewards), 1.0)).total_B.tolist() == rewards


def test_sources_of_one_name_stay_apart() -> None:
    sources = [Given(name, [float(index)] * 3) for index, name in enumerate(["f", "f_2", "f", "g", "f"])]
    found = scores(*((source, 1.0) for source in sources)).parts
    assert {name: float(part_B[0]) for name, part_B in found.items()} == {
        "f": 0,
        "f_2": 1,
        "f_3": 2,
        "g": 3,
        "f_4": 4,
    }


@pytest.mark.parametrize(("target", "expected"), [(None, [3, 5, 9]), (5, [-2, 0, -4])])
def test_length(target: int | None, expected: list[float]) -> None:
    assert scores((Length(target), 1.0)).total_B.tolist() == expected


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([0.0], "rl.reward mine: the reward must return 3 finite numbers, one per completion; it returned 1 of 3"),
        ([0.0, math.nan, 0.0], "score 1 is nan"),
        (KeyError("colour"), "the reward failed: KeyError: 'colour'"),
        ([0.0, 0.0, 1e31], "score 2 of the reward is 1e+31; its absolute value may be at most 1e+30"),
    ],
)
def test_a_kind_of_ones_own_is_checked_as_functions_are(returned: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        scores((Length(None), 1.0), (Given("mine", returned), 1.0))
    assert says in str(caught.value)


def test_the_reward_model_beside_a_length_is_what_it_is_alone(
    write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    """Held-out completions before RL do not depend on the reward, nor does the model's part of it."""

    def evaluated(name: str, reward: object) -> tuple[dict[str, Any], dict[str, float]]:
        settings = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2}
        out = tmp_path / name
        code, text = run_cli("run", write_recipe(rl=settings | {"reward": reward}), "--out", out)
        assert code == 0, text
        report = json.loads((out / "report.json").read_text())
        line = (out / "policy" / "metrics.jsonl").read_text().splitlines()[0]
        return report["stages"]["rl"]["eval"], json.loads(line)

    alone, step_alone = evaluated("alone", {})
    parts = [{"kind": "model", "weight": 2.0}, {"kind": "length", "target": 2}, {"kind": "length", "weight": -1}]
    together, step = evaluated("together", parts)
    before = together["reward_parts_before"]
    assert before["model"] == alone["reward_before"] == alone["reward_parts_before"]["model"]
    assert step["reward/model"] == step_alone["reward"]
    for whole, part in (
        (together["reward_before"], before),
        (together["reward_after"], together["reward_parts_after"]),
        (step["reward"], {name: step[f"reward/{name}"] for name in ("model", "length", "length_2")}),
    ):
        assert whole == pytest.approx(2 * part["model"] + part["length"] - part["length_2"])
    assert before["length_2"] >= 1
    assert before["length"] <= 0
