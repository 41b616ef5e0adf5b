"""The source `coffee-simulator`: played dialogues as records."""

from __future__ import annotations

import json
from itertools import islice
from random import Random

from perl.data.records import Demonstration, Prompt, Rating, Records
from perl.data.simulator.dialogues import SPAN, Dialogue, Row, from_row, moments, play, played, rated_rows
from perl.data.simulator.judge import judge

DEMONSTRATIONS, RATINGS, PROMPTS, CORPUS = range(4)
"""What dialogues are played for. Each purpose has seeds of its own, so no two share a dialogue."""


def simulate(
    seed: int = 0,
    dialogues: int = 1000,
    ratings: int = 2000,
    prompts: int = 1000,
    skill: float = 0.4,
    noise: float = 0.1,
) -> Records:
    """All records of the simulated shop, the same for the same arguments.

    Args:
        seed: decides everything.
        dialogues: demonstrations, whole dialogues of an agent of this skill.
        ratings: rated turns, two to a context.
        prompts: contexts that end where the agent is to speak, one to a dialogue.
        skill: the probability that an agent's turn is right.
        noise: the probability that a rating is not the gold judgement.
    """
    rows = rated_rows(_seed(seed, RATINGS), ratings, skill, noise)
    return Records(
        demonstrations=[
            demonstration(dialogue) for dialogue in islice(played(_seed(seed, DEMONSTRATIONS), skill), dialogues)
        ],
        ratings=[rating(row) for row in rows],
        prompts=[
            Prompt(context, key, {"state": state.to_dict()})
            for key, context, state in islice(moments(_seed(seed, PROMPTS), skill), prompts)
        ],
        judge=judge,
    )


def corpus(seed: int, dialogues: int) -> list[Demonstration]:
    """Dialogues of agents of all skills, bad to perfect, to pretrain a tiny language model on."""
    first, rng = _seed(seed, CORPUS) * SPAN, Random(f"corpus {seed}")
    return [demonstration(play(first + n, rng.uniform(0.3, 1.0))) for n in range(dialogues)]


def demonstration(dialogue: Dialogue) -> Demonstration:
    """A whole dialogue: the customer's first turn, and how it went on."""
    return Demonstration(dialogue.turns[:1], dialogue.turns[1:], dialogue.key)


def rating(row: Row) -> Rating:
    """A rated row of the simulator as a record."""
    return Rating(
        context=tuple(from_row(turn) for turn in json.loads(row["context"])),
        answer=from_row(json.loads(row["generation"])),
        label=row["reward"] == 1.0,
        dialogue=row["conversation_id"],
        gold=row["gold"] == 1.0,
    )


def _seed(seed: int, purpose: int) -> int:
    return 4 * seed + purpose
