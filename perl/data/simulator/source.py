"""The source `coffee-simulator`: played dialogues as records."""

from itertools import islice
from random import Random

from perl.data.records import Demonstration, Prompt, Records
from perl.data.simulator.dialogues import SPAN, Dialogue, moments, play, played, rated
from perl.data.simulator.judge import judge

DEMONSTRATIONS, RATINGS, PROMPTS, CORPUS = range(4)
"""What dialogues are played for; each purpose has seeds, and so dialogues, of its own."""


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
        dialogues: demonstrations, which are whole dialogues.
        ratings: rated turns, two to a context.
        prompts: contexts that end where the agent is to speak, one to a dialogue.
        skill: the probability that an agent's turn is right.
        noise: the probability that a rating is not the gold judgement.
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
    """Dialogues of agents of all skills, bad to perfect, to pretrain a tiny language model on."""
    first, rng = _seed(seed, CORPUS) * SPAN, Random(f"corpus {seed}")
    return [_demonstration(play(first + n, rng.uniform(0.3, 1.0))) for n in range(dialogues)]


def _demonstration(dialogue: Dialogue) -> Demonstration:
    """A whole dialogue: the customer's first turn, and how it went on."""
    return Demonstration(dialogue.turns[:1], dialogue.turns[1:], dialogue.key)


def _seed(seed: int, purpose: int) -> int:
    return 4 * seed + purpose
