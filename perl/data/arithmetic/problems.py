"""Word problems: what somebody has, what happens to it, and how much there is in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Sign = Literal["+", "-", "*"]

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "plums", "shells", "stamps")
BOXES = ("bags", "boxes", "bowls", "baskets")
GAINS = ("{other} gives {name} {n} more.", "{name} buys {n} more.", "{name} finds {n} more.")
LOSSES = ("{name} gives {n} to {other}.", "{name} loses {n}.", "{name} sells {n}.")
LARGEST = 60
"""No total is larger, and none is below 0."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on two numbers."""

    left: int
    sign: Sign
    right: int

    @property
    def result(self) -> int:
        """What it comes to."""
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.sign]

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A problem: its facts in sentences, the question, and the steps to the answer; step i needs fact i + 1.

    Where something is packed in boxes the first fact alone makes a step.
    """

    facts: tuple[str, ...]
    question: str
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """As it is put to the solver."""
        return " ".join((*self.facts, self.question))

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.steps[-1].result


def problems(rng: Random) -> Iterator[WordProblem]:
    """Problems without end."""
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
