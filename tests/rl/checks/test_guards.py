"""The guards: each detects its own kind of trouble soon and once, and none raises an alarm in healthy runs.

`recorded/` holds the metrics of three real runs: quickstart.yaml (the seed whose gold judge wavered most),
tinystories-animals.yaml, and tinystories-collapse.yaml with `guard: warn`.
"""

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from perl.rl.checks.alarms import WORDS, Alarm
from perl.rl.checks.guard_state import WINDOW, Limits
from perl.rl.checks.guards import Guard, last_good

Figures = dict[str, float]
Change = Callable[[int, Figures], None]

BEGIN = 31
"""The step at which simulated trouble begins."""


def recorded(name: str) -> list[Figures]:
    with open(Path(__file__).parent / "recorded" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def made_up(change: Change, steps: int = 60, seed: int = 0) -> list[Figures]:
    """Simulate a healthy run with noise, which `change` can spoil."""
    noise = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        gone = step / steps
        row = {
            "reward": 0.2 + 0.6 * gone + noise.gauss(0, 0.1),
            "kl": 3 * gone + noise.gauss(0, 0.2),
            "entropy": 0.5 - 0.2 * gone + noise.gauss(0, 0.03),
            "ended": 0.97 + noise.uniform(-0.03, 0.03),
            "answer_tokens": 20 + noise.gauss(0, 1),
            "gold": 0.5 + 0.2 * gone + noise.gauss(0, 0.05),
            "sampler_mismatch": 2e-6 + noise.uniform(0, 1e-6),
        }
        row["score"] = row["reward"]
        change(step, row)
        rows.append(row)
    return rows


def read(rows: list[Figures], guard: Guard | None = None) -> list[Alarm]:
    guard = guard or Guard(Limits())
    return [alarm for step, row in enumerate(rows, 1) for alarm in guard.check(step, row)]


def spoil(**values: float) -> Change:
    """Replace metrics from `BEGIN` on."""

    def change(step: int, row: Figures) -> None:
        if step >= BEGIN:
            row.update(values)

    return change


def exploits_the_reward(step: int, row: Figures) -> None:
    if step >= BEGIN:
        row["gold"] -= 0.02 * (step - BEGIN)


def learns_by_heart(step: int, row: Figures) -> None:
    del row["gold"]
    if step % 10 == 0:
        row["held_out"] = 0.3 + 0.01 * min(step, 30) - 0.04 * max(0, step - 30)
        row["held_out_error"] = 0.05


def nothing_is_learned(step: int, row: Figures) -> None:
    if step == BEGIN:
        row |= {"movement": 1e-9, "movement_at_the_end": 1e-8}


TROUBLES: dict[str, tuple[str, Change, int]] = {
    "kl": ("kl", spoil(kl=80.0), 3),
    "entropy": ("entropy", spoil(entropy=0.01), 3),
    "length_limit": ("length_limit", spoil(ended=0.0, score=0.1), 3),
    "shrinking": ("shrinking", spoil(answer_tokens=5.0, score=0.1, reward=0.1), 3),
    "empty, however well it scores": ("shrinking", spoil(answer_tokens=1.0, score=2.0, reward=2.0), 3),
    "entropy rising": ("entropy_rising", spoil(entropy=1.2, reward=0.2, score=0.2), 3),
    "sampler mismatch": ("sampler_mismatch", spoil(sampler_mismatch=0.05), 3),
    "nothing learned": ("nothing_learned", nothing_is_learned, 0),
    "gold judge": ("divergence", exploits_the_reward, 30),
    "held out": ("divergence", learns_by_heart, 20),
}


@pytest.mark.parametrize("name", ["quickstart", "animals"])
def test_nothing_is_seen_in_recorded_runs_that_went_well(name: str) -> None:
    assert read(recorded(name)) == []


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_seen_in_noise(seed: int) -> None:
    assert read(made_up(lambda step, row: None, steps=200, seed=seed)) == []


def test_a_recorded_collapse_is_caught_before_the_reward_is_gone() -> None:
    rows = recorded("collapse")
    gone = next(step for step in range(1, 60) if all(row["reward"] <= 0.2 for row in rows[step - 1 : step + 9]))
    (alarm,) = read(rows)
    assert alarm.name == "shrinking"
    assert alarm.grave
    assert gone - 5 < alarm.step <= gone + 5
    good = rows[: alarm.good_until + 1]
    assert min(row["answer_tokens"] for row in good) > 0.75 * good[0]["answer_tokens"]
    assert good[-1]["reward"] > 0.5


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_is_seen_soon_once_and_from_when_on(trouble: str) -> None:
    name, change, within = TROUBLES[trouble]
    (alarm,) = read(made_up(change))
    assert alarm.name == name
    assert alarm.grave
    assert BEGIN <= alarm.step <= BEGIN + within
    assert BEGIN - WINDOW - 6 <= alarm.good_until < BEGIN
    assert alarm.good_until < alarm.since <= alarm.step
    assert alarm.value is not None
    assert "nan" not in alarm.what


@pytest.mark.parametrize("trouble", [name for name in TROUBLES if name not in ("held out", "nothing learned")])
def test_a_bad_step_or_two_are_noise(trouble: str) -> None:
    _, change, _ = TROUBLES[trouble]
    assert read(made_up(lambda step, row: change(BEGIN, row) if step in (33, 34, 44) else None)) == []


def test_tiny_rewards_on_held_out_prompts_are_told_with_their_digits() -> None:
    def change(step: int, row: Figures) -> None:
        learns_by_heart(step, row)
        row |= {
            name: 1e-5 * row[name] for name in ("reward", "score", "held_out", "held_out_error") if name in row
        }

    (alarm,) = read(made_up(change))
    assert "fell from 6.0e-6 to 2.0e-6 while" in alarm.what


def test_a_base_that_was_unsure_of_everything_may_become_sure() -> None:
    """Entropy falls from nearly uniform to normal while the reward rises: reported, and the run continues."""

    def change(step: int, row: Figures) -> None:
        row["entropy"] = max(0.4, 5.5 - 0.2 * step)
        row["reward"] += 0.02 * step

    (alarm,) = read(made_up(change))
    assert (alarm.name, alarm.grave) == ("entropy", False)


def test_stories_that_score_better_need_not_end() -> None:
    """Plain text has no penalty for a missing end: reported once, and the run continues."""

    def change(step: int, row: Figures) -> None:
        row["ended"] = max(0.0, 0.9 - 0.05 * step)
        row["score"] = row["reward"] = row["reward"] + 0.02 * step

    (alarm,) = read(made_up(change))
    assert (alarm.name, alarm.grave) == ("length_limit", False)


def test_a_dip_of_what_was_gained_is_no_collapse() -> None:
    """Completions get shorter, with rewards far above those at the start and slightly below the best."""

    def change(step: int, row: Figures) -> None:
        row["answer_tokens"] = max(8.0, row["answer_tokens"] - step)
        row["reward"] += 0.06 * step if step < 40 else 0.06 * 40 - 0.3

    assert read(made_up(change)) == []


def test_short_answers_that_score_better_are_welcome() -> None:
    def change(step: int, row: Figures) -> None:
        row["answer_tokens"] = max(4.0, row["answer_tokens"] - step)
        row["reward"] += 0.02 * step

    assert read(made_up(change)) == []


def test_answers_that_never_ended_do_not_begin_to_run_into_the_limit() -> None:
    assert read(made_up(lambda step, row: row.update(ended=0.0))) == []


def test_where_reward_and_gold_fall_together_nothing_diverges() -> None:
    def change(step: int, row: Figures) -> None:
        if step >= BEGIN:
            row["gold"] -= 0.02 * (step - BEGIN)
            row["reward"] -= 0.03 * (step - BEGIN)

    assert read(made_up(change)) == []


def test_what_passes_and_comes_again_is_said_again() -> None:
    rows = made_up(lambda step, row: row.update(kl=60.0) if step in {*range(20, 30), *range(45, 55)} else None)
    assert [(alarm.name, alarm.step) for alarm in read(rows)] == [("kl", 22), ("kl", 47)]


def test_equal_rewards_are_said_after_ten_steps_and_are_grave_after_fifty() -> None:
    rows = made_up(lambda step, row: row.update(no_signal=1.0) if step > 5 or step == 2 else None)
    alarms = read(rows)
    assert [(a.name, a.step, a.since, a.good_until, a.grave) for a in alarms] == [
        ("no_signal", 15, 6, 15, False),  # without one, no update was made, so there is nothing to roll back
        ("no_signal", 55, 6, 55, True),
    ]
    assert "The reward does not distinguish completions" in alarms[0].causes
    assert "learning_rate" not in alarms[0].causes + alarms[0].remedy


@pytest.mark.parametrize(
    ("moves", "grave", "rate"),
    [(1e-3, False, "0.01"), (2.5e-3, False, "0.004"), (1e-9, True, "0.01"), (0, True, "auto")],
)
def test_a_policy_that_will_not_move_is_said_with_the_rate_to_try(moves: float, grave: bool, rate: str) -> None:
    guard = Guard(Limits(step_size=1e-4))
    (alarm,) = read(made_up(lambda step, row: row.update(movement_at_the_end=moves) if step == 1 else None), guard)
    assert (alarm.name, alarm.step, alarm.good_until, alarm.grave) == ("nothing_learned", 1, 0, grave)
    assert alarm.remedy == f"Set rl.learning_rate: {rate}."


@pytest.mark.parametrize(("moves", "better"), [(1e-4, "0.01"), (2.9e-3, "0.001"), (0, "0.01")])
def test_under_the_natural_gradient_the_trust_region_is_named(moves: float, better: str) -> None:
    guard = Guard(Limits(step_key="trust_region", step_size=1e-6))
    (alarm,) = read(made_up(lambda step, row: row.update(movement_at_the_end=moves) if step == 1 else None), guard)
    assert alarm.remedy == f"Set rl.trust_region: {better}."
    assert alarm.causes.startswith("The trust region is too small")


def test_a_policy_that_moves_is_left_alone() -> None:
    assert read(made_up(lambda step, row: row.update(movement_at_the_end=0.01) if step == 1 else None)) == []


def test_entropy_may_rise_with_the_reward_and_little_may_double() -> None:
    def explores(step: int, row: Figures) -> None:
        row["entropy"] += 0.02 * step
        row["reward"] += 0.02 * step

    def hardly(step: int, row: Figures) -> None:
        row.update(entropy=0.05 + 0.003 * step, reward=0.2)

    assert read(made_up(explores)) == read(made_up(hardly)) == []


@pytest.mark.parametrize("penalized", [True, False])
def test_completions_that_shrink_under_a_penalty_for_a_missing_end(penalized: bool) -> None:
    """The reward falls and completions end: the cause is the penalty, not the learning rate or KL coefficient."""

    def change(step: int, row: Figures) -> None:
        row.update(ended=min(1.0, step / 40), answer_tokens=max(1.0, 48 - step), reward=0.4 - 0.005 * step)
        row["score"] = row["reward"] - (1 - row["ended"])

    (alarm,) = read(made_up(change), Guard(Limits(penalized=penalized)))
    assert alarm.name == "shrinking"
    assert alarm.step < 45  # before there is one token left
    assert ("missing end" in alarm.causes) is penalized
    assert ("rl.missing_end_penalty" in alarm.remedy) is penalized
    assert ("rl.kl_coef" in alarm.remedy) is not penalized


def test_shrinking_is_not_blamed_on_a_kl_penalty_that_does_not_exist() -> None:
    limits = Limits(kl_term=False, hold="set rl.kl, such as to loss-k3")
    (alarm,) = read(made_up(TROUBLES["shrinking"][1]), Guard(limits))
    assert alarm.name == "shrinking"
    assert "penalty" not in alarm.causes
    assert alarm.remedy == "Read the samples; lower rl.learning_rate or set rl.kl, such as to loss-k3."


def test_a_mismatch_that_rounding_explains_is_left_alone() -> None:
    rows = made_up(lambda step, row: row.update(sampler_mismatch=0.02 * (1 + step / 60)))
    assert read(rows, Guard(Limits(mismatch=0.04))) == []


def test_refused_updates_are_said_at_once_and_are_grave_three_in_a_row() -> None:
    refused = {12, 30, 31, 32, 33}
    rows = made_up(lambda step, row: row.update(refused=1.0, reward=math.inf) if step in refused else None)
    alarms = read(rows)
    assert [(a.name, a.step, a.since, a.good_until, a.grave) for a in alarms] == [
        ("not_finite", 12, 12, 11, False),
        ("not_finite", 30, 30, 29, False),
        ("not_finite", 32, 30, 29, True),
    ]
    assert alarms[0].value is None


def test_figures_that_are_missing_or_not_finite_are_passed_over() -> None:
    guard = Guard(Limits())
    for step in range(1, 30):
        assert guard.check(step, {"kl": math.nan, "score": math.inf} if step % 2 else {}) == []
    json.dumps(guard.state_dict(), allow_nan=False)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_resumed_run_alarms_as_one_left_in_peace(trouble: str) -> None:
    rows = made_up(TROUBLES[trouble][1])
    guard = Guard(Limits())
    resumed = []
    for step, row in enumerate(rows, 1):
        resumed += guard.check(step, row)
        state = json.dumps(guard.state_dict(), allow_nan=False)
        guard = Guard(Limits())
        guard.load_state_dict(json.loads(state))
    assert resumed == read(rows)
    assert guard.alarms == resumed


def test_each_doubling_of_the_kl_from_a_32nd_of_its_limit_is_told_once() -> None:
    guard, told = Guard(Limits(kl=32.0)), []
    assert not guard.moved_far, "no step was taken"
    for step, kl in enumerate((0.9, 1.5, 1.9, 6.0, 3.0, 7.9, 8.0), 1):
        guard.check(step, {"kl": kl})
        asked = {guard.moved_far for _ in range(2)}
        assert len(asked) == 1, "to ask changes nothing"
        told += [step] if asked == {True} else []
    assert told == [2, 4, 7], "1; 2 and 4 at once; 8"


def test_what_may_be_gone_back_to_is_needed() -> None:
    guard = Guard(Limits())
    read(made_up(spoil(answer_tokens=12.0), steps=50), guard)  # it shows, but is not certain
    assert any(BEGIN - WINDOW - 2 <= step < BEGIN for step in guard.needed)
    assert guard.alarms == []


@pytest.mark.parametrize(("until", "step"), [(45, 40), (40, 40), (39, 20), (0, 0)])
def test_the_last_good_checkpoint(until: int, step: int) -> None:
    assert last_good(until, [0, 20, 40, 60]) == step


def test_every_alarm_has_words_that_say_what_to_do() -> None:
    special = {"not_finite", "no_signal", "shrinking_by_penalty", "shrinking_without_kl"}
    assert {name for name, _, _ in TROUBLES.values()} | special == set(WORDS)
