"""Simulated word problems of one to three steps, with solvers of any skill and an exact checker.

A problem says what somebody has and what happens to it, and asks how much there is in the end.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal

from perl.data.answers import is_right
from perl.data.records import Demonstration, Prompt, Records, Turn

Sign = Literal["+", "-", "*"]

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "plums", "shells", "stamps")
BOXES = ("bags", "boxes", "bowls", "baskets")
GAINS = ("{other} gives {name} {n} more.", "{name} buys {n} more.", "{name} finds {n} more.")
LOSSES = ("{name} gives {n} to {other}.", "{name} loses {n}.", "{name} sells {n}.")
LARGEST = 60
"""Maximum total; the minimum is 0."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on two numbers."""

    left: int
    sign: Sign
    right: int

    @property
    def result(self) -> int:
        """The result of the operation."""
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.sign]

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A problem: its facts as sentences, the question, and the steps to the answer; step i needs fact i + 1.

    If things are packed in boxes, the first fact alone is a step.
    """

    facts: tuple[str, ...]
    question: str
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """The problem as text."""
        return " ".join((*self.facts, self.question))

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.steps[-1].result


def problems(rng: Random) -> Iterator[WordProblem]:
    """Yield endless problems."""
    while True:
        yield _drawn(rng)


def _drawn(rng: Random) -> WordProblem:
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    steps: list[Step] = []
    if packed := rng.random() < 0.4:
        boxes, each = rng.randint(2, 6), rng.randint(2, 9)
        facts = [f"{name} has {boxes} {rng.choice(BOXES)} of {each} {things}."]
        steps.append(Step(boxes, "*", each))
        total = boxes * each
    else:
        total = rng.randint(2, 30)
        facts = [f"{name} has {total} {things}."]
    for _ in range(rng.choice((0, 1) if packed else (1, 2))):
        sign: Sign = "+" if total < 3 or (total < LARGEST - 20 and rng.random() < 0.5) else "-"
        number = rng.randint(2, 20) if sign == "+" else rng.randint(1, min(20, total - 1))
        sentence = rng.choice(GAINS if sign == "+" else LOSSES)
        facts.append(sentence.format(name=name, other=other, n=number))
        steps.append(Step(total, sign, number))
        total = steps[-1].result
    return WordProblem(tuple(facts), f"How many {things} does {name} have now?", tuple(steps))


# Solvers that make mistakes, and the checker that finds every mistake.


_EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (-?\d+)")
_OTHERS: dict[Sign, Sign] = {"+": "-", "-": "+", "*": "+"}


def solution(problem: WordProblem, skill: float, rng: Random, wordy: float = 0.5) -> str:
    """Return a solution in equations, as in "7 + 5 = 12. The answer is 12."

    Args:
        skill: the probability that a step is right; later steps continue from a wrong result.
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
    """Return gold scores: 1 if the answer and all equations, at least one, are right; else 0."""
    return [float(_sound(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


def _sound(prompt: Prompt, text: str) -> bool:
    equations = _EQUATION.findall(text)
    true = all(Step(int(a), sign, int(b)).result == int(c) for a, sign, b, c in equations)
    return bool(equations) and true and is_right("number", text, prompt.columns["answer"])


def _slip(step: Step, rng: Random) -> tuple[Step, int]:
    """Return the wrong operation, or the right one with a wrong result."""
    other = Step(step.left, _OTHERS[step.sign], step.right)
    if rng.random() < 0.5 and other.result >= 0:
        return other, other.result
    return step, max(0, step.result + rng.choice((-10, -2, -1, 1, 2, 10)))


# The source `arithmetic-simulator`: problems and their solutions as records.


SHARE = 4
"""One problem in this many is used for records; the corpus of a tiny base has none of these."""


def simulate(seed: int, demonstrations: int, prompts: int, skill: float = 0.6) -> Records:
    """Return demonstrations by a mediocre solver, and prompts of other problems; deterministic in its arguments.

    Args:
        skill: the probability that a step of a demonstration is right.
    """
    rng = Random(f"arithmetic {seed}")
    own = _distinct(rng, in_corpus=False)
    return Records(
        demonstrations=[_demonstration(one, skill, rng) for one in islice(own, demonstrations)],
        prompts=[
            Prompt((Turn("user", one.text),), one.text, {"answer": str(one.answer)})
            for one in islice(own, prompts)
        ],
        judge=check,
    )


def corpus(seed: int, count: int) -> list[Demonstration]:
    """Return solutions by solvers of all skills, to pretrain a tiny language model on."""
    rng = Random(f"arithmetic corpus {seed}")
    chosen = islice(_distinct(rng, in_corpus=True), count)
    return [_demonstration(one, rng.uniform(0.4, 1.0), rng) for one in chosen]


def _distinct(rng: Random, in_corpus: bool) -> Iterator[WordProblem]:
    """Yield the distinct problems of one side."""
    seen = set[str]()
    for problem in problems(rng):
        if (zlib.crc32(problem.text.encode()) % SHARE > 0) == in_corpus and problem.text not in seen:
            seen.add(problem.text)
            yield problem


def _demonstration(problem: WordProblem, skill: float, rng: Random) -> Demonstration:
    answer = Turn("agent", solution(problem, skill, rng))
    return Demonstration((Turn("user", problem.text),), (answer,), problem.text)
