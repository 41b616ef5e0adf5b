"""The word problems: their answers, solvers of known skill, and the checker."""

from itertools import islice
from random import Random

import pytest

from perl.data.arithmetic import Step, WordProblem, check, corpus, problems, simulate, solution
from perl.data.records import Prompt, Turn

PROBLEM = WordProblem(
    ("Ann has 3 bags of 4 eggs.", "Ann loses 5."),
    "How many eggs does Ann have now?",
    (Step(3, "*", 4), Step(12, "-", 5)),
)
PROMPT = Prompt((Turn("user", PROBLEM.text),), PROBLEM.text, {"answer": "7"})


def test_both_ways_to_solve_a_problem() -> None:
    assert solution(PROBLEM, 1.0, Random(0), wordy=0) == "3 * 4 = 12. 12 - 5 = 7. The answer is 7."
    assert solution(PROBLEM, 1.0, Random(0), wordy=1) == (
        "Ann has 3 bags of 4 eggs. So 3 * 4 = 12. Ann loses 5. So 12 - 5 = 7. The answer is 7."
    )


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3 * 4 = 12. 12 - 5 = 7. The answer is 7.", 1),
        ("3 * 4 = 12. 12 - 5 = 8. The answer is 8.", 0),
        ("3 * 4 = 13. 12 - 5 = 7. The answer is 7.", 0),  # the right answer by a wrong equation
        ("The answer is 7.", 0),  # without any
        ("3 * 4 = 12. 12 - 5 = 7. The answer is 12.", 0),
    ],
)
def test_the_checker_sees_answer_and_equations(text: str, right: float) -> None:
    assert check([PROMPT], [text]) == [right]


def test_problems_are_solved_as_often_as_the_skill_says() -> None:
    rng = Random(0)
    drawn = list(islice(problems(rng), 2_000))
    assert all(0 <= step.result <= 100 for one in drawn for step in one.steps)
    prompts = [Prompt((), one.text, {"answer": str(one.answer)}) for one in drawn]
    for skill in (1.0, 0.7):
        right = check(prompts, [solution(one, skill, rng) for one in drawn])
        expected = sum(skill ** len(one.steps) for one in drawn) / len(drawn)
        assert sum(right) / len(right) == pytest.approx(expected, abs=0.04 if skill < 1 else 0)


def test_records_are_the_same_for_a_seed_and_the_corpus_has_none_of_their_problems() -> None:
    records = simulate(3, demonstrations=40, prompts=40)
    assert records == simulate(3, demonstrations=40, prompts=40)
    assert records.prompts != simulate(4, demonstrations=40, prompts=40).prompts
    asked = [one.dialogue for one in (*records.demonstrations, *records.prompts)]
    assert len(set(asked)) == 80
    assert not set(asked) & {one.dialogue for one in corpus(0, 500)}
