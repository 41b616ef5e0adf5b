"""Solvers of word problems who slip, and the checker that sees every slip."""

import re
from collections.abc import Sequence
from random import Random

from perl.data.answers import is_right
from perl.data.arithmetic.problems import Sign, Step, WordProblem
from perl.data.records import Prompt

_EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (-?\d+)")
_OTHERS: dict[Sign, Sign] = {"+": "-", "-": "+", "*": "+"}


def solution(problem: WordProblem, skill: float, rng: Random, wordy: float = 0.5) -> str:
    """A solution in equations, as in "7 + 5 = 12. The answer is 12."

    Args:
        skill: the probability that a step is right; a wrong one is gone on from.
        wordy: the probability that each fact is repeated before it is used.
    """
    repeats = rng.random() < wordy
    facts = list(problem.facts)
    sentences = [facts.pop(0)] if repeats else []
    total = problem.steps[0].left
    for number, step in enumerate(problem.steps):
        if repeats and (number or len(problem.facts) == len(problem.steps) + 1):
            sentences.append(facts.pop(0))
        taken = Step(total, step.sign, step.right)
        total = taken.result
        if rng.random() >= skill:
            taken, total = _slip(taken, rng)
        sentences.append(f"{'So ' if repeats else ''}{taken} = {total}.")
    return " ".join([*sentences, f"The answer is {total}."])


def check(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """The gold judge: 1 where the answer is right and so is every equation, of which there is one; else 0."""
    return [float(_sound(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


def _sound(prompt: Prompt, text: str) -> bool:
    equations = _EQUATION.findall(text)
    true = all(Step(int(a), sign, int(b)).result == int(c) for a, sign, b, c in equations)
    return bool(equations) and true and is_right("number", text, prompt.columns["answer"])


def _slip(step: Step, rng: Random) -> tuple[Step, int]:
    """The wrong operation, or a wrong result of the right one."""
    other = Step(step.left, _OTHERS[step.sign], step.right)
    if rng.random() < 0.5 and other.result >= 0:
        return other, other.result
    return step, max(0, step.result + rng.choice((-10, -2, -1, 1, 2, 10)))
