"""The source `arithmetic-simulator`: word problems and their solutions as records."""

import zlib
from collections.abc import Iterator
from itertools import islice
from random import Random

from perl.data.arithmetic.problems import WordProblem, problems
from perl.data.arithmetic.solver import check, solution
from perl.data.records import Demonstration, Prompt, Records, Turn

SHARE = 4
"""One problem in so many goes into records; the corpus of a tiny base has none of these."""


def simulate(seed: int, demonstrations: int, prompts: int, skill: float = 0.6) -> Records:
    """Demonstrations by a mediocre solver, and prompts, of problems of their own; the same for the same arguments.

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
    """Solutions by solvers of all skills, to pretrain a tiny language model on."""
    rng = Random(f"arithmetic corpus {seed}")
    chosen = islice(_distinct(rng, in_corpus=True), count)
    return [_demonstration(one, rng.uniform(0.4, 1.0), rng) for one in chosen]


def _distinct(rng: Random, in_corpus: bool) -> Iterator[WordProblem]:
    """Problems of one side, each once."""
    seen = set[str]()
    for problem in problems(rng):
        if (zlib.crc32(problem.text.encode()) % SHARE > 0) == in_corpus and problem.text not in seen:
            seen.add(problem.text)
            yield problem


def _demonstration(problem: WordProblem, skill: float, rng: Random) -> Demonstration:
    answer = Turn("agent", solution(problem, skill, rng))
    return Demonstration((Turn("user", problem.text),), (answer,), problem.text)
