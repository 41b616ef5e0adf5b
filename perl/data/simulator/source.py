"""The source `coffee-simulator`: simulated dialogues as records."""

from itertools import islice
from random import Random

from perl.data.records import Demonstration, Prompt, Records
from perl.data.simulator.dialogues import SPAN, Dialogue, moments, play, played, rated
from perl.data.simulator.judge import judge

DEMONSTRATIONS, RATINGS, PROMPTS, CORPUS = range(4)
"""Purposes of dialogues; each has its own seeds, and so its own dialogues."""


def simulate(
    seed: int = 0,
    dialogues: int = 1000,
    ratings: int = 2000,
    prompts: int = 1000,
    skill: float = 0.4,
    noise: float = 0.1,
) -> Records:
    """Return all records of the simulated shop, the same for the same arguments.

    Args:
        dialogues: number of demonstrations, which are whole dialogues.
        ratings: number of rated turns, two per context.
        prompts: number of contexts that end where the agent speaks next, one per dialogue.
        skill: the probability that an agent's turn is right.
        noise: the probability that a rating differs from the gold verdict.
    """
    demonstrations = islice(played(_seed(seed, DEMONSTRATIONS), skill), dialogues)
    return Records(
        demonstrations=[_demonstration(dialogue) for dialogue in demonstrations],
        ratings=rated(_seed(seed, RATINGS), ratings, skill, noise),
        prompts=[
            Prompt(context, key, {"state": state.to_json()})
            for key, context, state in islice(moments(_seed(seed, PROMPTS), skill), prompts)
        ],
        judge=judge,
    )


def corpus(seed: int, dialogues: int) -> list[Demonstration]:
    """Return dialogues of agents of all skills, bad to perfect, to pretrain a tiny language model on."""
    first, rng = _seed(seed, CORPUS) * SPAN, Random(f"corpus {seed}")
    return [_demonstration(play(first + n, rng.uniform(0.3, 1.0))) for n in range(dialogues)]


def _demonstration(dialogue: Dialogue) -> Demonstration:
    """Return a whole dialogue with the customer's first turn as context."""
    return Demonstration(dialogue.turns[:1], dialogue.turns[1:], dialogue.key)


def _seed(seed: int, purpose: int) -> int:
    return 4 * seed + purpose
