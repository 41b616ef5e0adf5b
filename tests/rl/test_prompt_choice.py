"""The choice of a step's prompts."""

from collections import Counter

import pytest

from perl.data.records import Prompt
from perl.errors import UserError
from perl.rl.prompt_choice import PromptChoice, easiest_first
from perl.rl.prompts import prompts_of


def choice(kind: str, **changes: object) -> PromptChoice:
    return PromptChoice(**{"kind": kind, "count": 10, "per_step": 2, "steps": 20, "seed": 1} | changes)  # type: ignore[arg-type]


def test_uniformly_all_are_seen_in_turn() -> None:
    assert [choice("uniform").of_step(step) for step in range(8)] == [
        prompts_of(step, 2, 10, 1) for step in range(8)
    ]
    assert len(set(choice("uniform").of_step(3, draw=1))) == 2


def test_prioritised_in_proportion_to_one_minus_the_success_rate() -> None:
    """Prompts with success rates 1, ¾, 0 and unknown (0) are drawn first 0, 1/9, 4/9 and 4/9 of the time."""
    asked = choice("prioritised", count=4, per_step=1)
    asked.learn([0] * 4 + [1] * 4 + [2] * 4, [True] * 4 + [True] * 3 + [False] + [False] * 4)
    assert [asked.success_rate(prompt) for prompt in range(4)] == [1.0, 0.75, 0.0, 0.0]
    drawn = Counter(asked.of_step(step)[0] for step in range(3000))
    assert drawn[0] == 0
    assert [drawn[prompt] / 3000 for prompt in (1, 2, 3)] == pytest.approx([1 / 9, 4 / 9, 4 / 9], abs=0.03)


def test_what_is_always_right_is_drawn_only_where_nothing_else_is_left() -> None:
    asked = choice("prioritised", count=3, per_step=5)
    asked.learn([0, 1, 2], [True, True, False])
    assert [asked.of_step(step)[0] for step in range(5)] == [2] * 5
    assert Counter(asked.of_step(0)).most_common()[-1][1] == 1  # all three before any is drawn again


def test_a_curriculum_begins_with_the_easy_ones_and_ends_prioritised() -> None:
    """Over the first half of 20 steps, each step draws from one more prompt."""
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    asked = choice("curriculum", easiest_first=order)
    assert set(asked.of_step(0)) == {9, 8}
    for step in range(9):
        assert set(asked.of_step(step)) <= set(order[: max(2, step + 1)])
    asked.learn(order, [prompt > 1 for prompt in order])
    assert set(asked.of_step(15)) == {0, 1}


def test_its_state_is_all_that_it_remembers() -> None:
    asked = choice("curriculum", easiest_first=list(range(10)))
    asked.learn([1, 1, 2], [True, False, True])
    again = choice("curriculum")
    assert again.must_measure
    again.load_state_dict(asked.state_dict())
    assert again == asked


def test_difficulties_are_all_prompts_or_none() -> None:
    def prompts(*columns: dict[str, int | str]) -> list[Prompt]:
        return [Prompt((), "", one) for one in columns]

    assert easiest_first(prompts({"difficulty": 3}, {"difficulty": 1}), "here") == [1, 0]
    assert easiest_first(prompts({}, {}), "here") is None
    with pytest.raises(UserError, match="1 of 2 prompts have no number"):
        easiest_first(prompts({"difficulty": 3}, {"difficulty": "hard"}), "here")
