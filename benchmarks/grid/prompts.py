"""Prompts for the grid's models: openings of stories as plain text, and requests for stories as chat.

No prompt names an animal, so all animals in a completion come from the policy.
"""

import itertools
import random
from typing import Literal

Kind = Literal["text", "chat"]

TRAINING, JUDGED = 200, 64
"""Prompts in a recipe's data file, a fifth of which the run holds out; and prompts that only the judge sees."""

TIMES = (
    "Once upon a time", "One day", "Long ago", "Yesterday", "One sunny morning", "Last winter", "After lunch",
    "On a rainy day",
)  # fmt: skip
PEOPLE = (
    "a little girl", "a little boy", "an old man", "a kind woman", "a brave knight", "a small robot",
    "a young king", "a shy princess", "a busy baker", "a poor farmer", "a tired teacher", "a sleepy giant",
    "a tiny fairy", "a careful doctor", "a sad painter", "a round snowman", "a quiet neighbor", "a clever wizard",
    "a lonely sailor", "a proud dancer", "a new mailman", "a strong builder", "a funny clown", "a curious child",
)  # fmt: skip
DEEDS = (
    "went to the park", "found a box in the garden", "wanted to bake a cake", "got lost in the woods",
    "could not sleep", "built a tall tower", "lost a shoe", "planted a seed", "climbed a hill", "painted the wall",
    "heard a loud noise", "broke a cup", "sailed a boat", "learned to swim", "met a stranger",
    "saw a light in the sky", "hid under the bed", "wrote a letter", "fixed a bike", "opened an old door",
    "picked some flowers", "dropped an ice cream", "sang a song", "looked for a key",
)  # fmt: skip
REQUESTS = (
    "Tell me a story about {who} who {did}.",
    "Write a short story: {who} {did}.",
    "What happened to {who} who {did}?",
    "I want to hear about {who} who {did}, please.",
    "{when}, {who} {did}. Go on!",
    "Please tell us how {who} {did}.",
    "Make up a tale in which {who} {did}.",
    "Do you know the one about {who} who {did}?",
)


def everything(kind: Kind) -> list[tuple[str, str]]:
    """Return all prompts in one fixed random order, each with the opening of a story that answers it."""
    pairs, rng = [], random.Random(0)
    for when, who, did in itertools.product(TIMES, PEOPLE, DEEDS):
        opening = f"{when}, {who} {did}"
        request = rng.choice(REQUESTS).format(when=when, who=who, did=did)
        pairs.append((opening if kind == "text" else request[0].upper() + request[1:], opening))
    unique = list(dict(pairs).items())
    rng.shuffle(unique)
    return unique


def training(kind: Kind) -> list[str]:
    """Return the prompts of a recipe's data file."""
    return [prompt for prompt, _ in everything(kind)[:TRAINING]]


def judged(kind: Kind) -> list[str]:
    """Return the prompts that the policy is judged on; no recipe sees them."""
    return [prompt for prompt, _ in everything(kind)[TRAINING : TRAINING + JUDGED]]


def others(kind: Kind) -> list[tuple[str, str]]:
    """Return the remaining prompts, with their openings, for pretraining."""
    return everything(kind)[TRAINING + JUDGED :]
