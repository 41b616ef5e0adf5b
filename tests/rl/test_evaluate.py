"""The evaluation of a policy: enough completions, equal draws for all, and claims that the interval supports."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from perl.data.records import Prompt
from perl.measure.change import fixed, measured_words
from perl.rl.evaluate import policy_change, samples_per_prompt, spread_words
from perl.rl.rollout import EncodedPrompts
from tests.conftest import RunCli, WriteRecipe, write_rows

REWARD = """
import json, pathlib

def flip(completions, **columns):
    ''' 1 for about half of the completions. '''
    rewards = [float(len(text.encode()) % 2) for text in completions]
    with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps(rewards) + "\\n")
    return rewards
"""


@pytest.mark.parametrize(("prompts", "each"), [(1, 32), (8, 32), (24, 11), (100, 3), (128, 2), (256, 1), (999, 1)])
def test_few_prompts_are_answered_several_times(prompts: int, each: int) -> None:
    assert samples_per_prompt(prompts) == each


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([0.0, 1.0], ": mean 0.5, standard deviation 0.5, 0 to 1."),
        ([1e-5, 2e-5, 3e-5], ": mean 2e-05, standard deviation 8.16e-06, 1e-05 to 3e-05."),
        ([1e6, 1003e3, 1006e3], ": mean 1.003e+06, standard deviation 2.45e+03, 1e+06 to 1.006e+06."),
        ([-10.2, -10.1, -10.1], ": mean -10.133, standard deviation 0.0471, -10.2 to -10.1."),
        ([1e6, 1e6 + 1], "only 0.5 around 1e+06, which training takes for rounding"),
        ([2.0, 2.0], "are all 2"),
    ],
)
def test_rewards_of_any_scale_are_described(rewards: list[float], words: str) -> None:
    assert words in spread_words(rewards)


@pytest.mark.parametrize("rewards", [[0.6, 0.1 + 0.2 + 0.3], [1e17, 1e17], [-1e30, -1e30], [0, 0], [0, 1e-9]])
def test_rewards_that_differ_by_rounding_or_not_at_all_have_a_histogram(rewards: list[float]) -> None:
    prompts = EncodedPrompts([Prompt((), name) for name in "ab"], [[1], [2]], [0, 1])
    metrics = {"reward": rewards} | {name: [0.0, 1.0] for name in ("kl", "answer_tokens", "ended")}
    histogram = policy_change(metrics, dict(metrics), prompts, 1).reward_histogram
    assert histogram is not None
    assert histogram.edges == sorted(set(histogram.edges))
    assert sum(histogram.before) == sum(histogram.after) == 2


def run(run_cli: RunCli, recipe: Path, out: Path) -> tuple[dict[str, Any], str]:
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    return json.loads((out / "report.json").read_text())["stages"]["rl"]["eval"], text


@pytest.fixture
def recipe(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """Write a recipe with 24 held-out prompts, and a reward that training at this rate does not change."""
    (tmp_path / "flip.py").write_text(REWARD)
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Number {n} is"} for n in range(48)])
    return write_recipe(
        data={"source": "jsonl", "path": str(file), "held_out": 0.5},
        reward=None,
        rl={
            "reward": {"function": "flip.py:flip"},
            "steps": 2,
            "prompts_per_step": 8,
            "max_new_tokens": 6,
            "eval_samples": None,
            "learning_rate": 1e-6,
        },
    )


def test_the_change_has_an_interval_and_chance_is_not_called_a_rise(
    recipe: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    metrics, text = run(run_cli, recipe, tmp_path / "out")
    assert (metrics["n"], metrics["samples_per_prompt"]) == (24, 11)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    before = [reward for call in calls for reward in call][: 24 * 11]  # nothing is scored earlier
    assert metrics["reward_before"] == pytest.approx(statistics.fmean(before))
    for name in ("reward", "answer_tokens", "ended"):
        low, high = metrics[f"{name}_interval"]
        assert low <= metrics[f"{name}_after"] - metrics[f"{name}_before"] <= high
    assert metrics["kl_interval"][0] <= metrics["kl"] <= metrics["kl_interval"][1]
    # The draws are the same, so that a policy that did not change does not differ by chance.
    assert metrics["reward_after"] == metrics["reward_before"]
    assert metrics["reward_interval"] == [0, 0]
    assert "the reward did not clearly change, 0." in text
    assert "rose" not in text


def test_rewards_that_an_algorithm_cannot_use_are_refused_before_the_first_step(
    recipe: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    (tmp_path / "flip.py").write_text(
        "def flip(completions, **kwargs):\n    return [-len(one) - 1 for one in completions]\n"
    )
    asked = ("rl.algorithm=maxrl", "rl.samples_per_prompt=4")
    code, text = run_cli("run", recipe, *asked, "--out", tmp_path / "out")
    assert code == 2, text
    assert "maxrl divides by the mean reward of a prompt's completions" in " ".join(text.split())
    assert not (tmp_path / "out" / "policy" / "metrics.jsonl").exists()


def test_evaluate_gives_the_same_figures_and_shows_their_intervals(
    recipe: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    metrics, _ = run(run_cli, recipe, tmp_path / "out")
    code, text = run_cli("evaluate", tmp_path / "out", "policy", "--json", tmp_path / "eval.json")
    assert code == 0, text
    assert "0 in every dialogue" in text
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found == {name: metrics[name] for name in found}
    assert {"reward_before", "reward_after", "reward_interval", "kl", "kl_interval", "n"} <= set(found)


@pytest.mark.parametrize(
    ("before", "after", "interval", "words"),
    [
        (0.42, 0.42, (-0.03, 0.03), "did not clearly change, 0.420 before and 0.420 after"),
        (
            0.3,
            0.93,
            (0.55, 0.71),
            "rose, 0.30 before and 0.93 after (95 % interval of the change: +0.55 to +0.71)",
        ),
        (0.0028, 0.0042, (0.001, 0.0018), "rose, 0.00280 before and 0.00420 after"),
        (0.424, 0.423, (-0.0015, -0.0005), "fell, 0.4240 before and 0.4230 after"),
        (28.0, 160.0, (90.0, 170.0), "rose, 28 before and 160 after"),
        (1.0, 2.0, None, "was 1.0 before and 2.0 after (all prompts are from one dialogue"),
        (
            2e-6,
            5e-6,
            (1e-6, 4e-6),
            "rose, 2.0e-6 before and 5.0e-6 after (95 % interval of the change: +1.0e-6 to",
        ),
        (3787878.86, 3790000.0, (1e4, 9e4), "rose, 3.788e6 before and 3.790e6 after"),
        (-0.001, 0.5, (0.4, 0.6), "rose, 0.00 before and 0.50 after"),
        (1e-6, 1e-6, (0.0, 0.0), "did not clearly change, 1.0e-6 before and 1.0e-6 after"),
        (1.0, 1.0, (0.0, 0.0), "did not clearly change, 1.00 before and 1.00 after (the change is 0 in every"),
        (1.0, 1.5, (0.5, 0.5), "rose, 1.00 before and 1.50 after (the change is equal in every dialogue)"),
        (1.0, 1.5, (0.5 - 1e-15, 0.5), "rose, 1.00 before and 1.50 after (the change is equal in every dialogue)"),
    ],
)
def test_words_of_a_change(before: float, after: float, interval: tuple[float, float] | None, words: str) -> None:
    assert measured_words(before, after, interval).startswith(words)


def test_a_share_is_told_in_per_cent() -> None:
    expected = "rose, 47 % before and 64 % after (95 % interval of the change: +10 to +24 points)"
    assert measured_words(0.47, 0.64, (0.1, 0.24), percent=True) == expected


def test_no_zero_has_a_minus() -> None:
    assert (fixed(-0.04, 1), fixed(-1e-9, 4), fixed(-1e-9, 2, sign=True)) == ("0.0", "0.0000", "+0.00")
