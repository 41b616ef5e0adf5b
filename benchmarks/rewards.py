"""Reward functions of the grid, with TRL's signature.

Each takes `completions` (text or chat messages) and further columns, which it ignores, and returns one float per
completion.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

Completion = str | list[dict[str, str]]
RewardFunction = Callable[..., list[float]]

ANIMALS = re.compile(
    r"\b(cat|dog|bird|bunny|rabbit|bear|fish|frog|duck|mouse|lion|tiger|monkey|elephant|horse|cow|pig|sheep|fox|bee)s?\b"
)
CHEERFUL = re.compile(
    r"\b(happy|happily|glad|fun|smil\w+|laugh\w*|lov\w+|play\w*|friends?|nice|good|best|proud|hug\w*|excited)\b"
)


def texts_of(completions: Sequence[Completion]) -> list[str]:
    """Return the completions' text, whether they are text or chat messages."""
    return [one if isinstance(one, str) else one[-1]["content"] for one in completions]


def animals(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Dense: one point for each kind of animal, at most three."""
    return [float(min(3, len(set(ANIMALS.findall(text.lower()))))) for text in texts_of(completions)]


def mentions(completions: Sequence[Completion], *, word: str, **columns: Any) -> list[float]:
    """Sparse: 1 where the word occurs, else 0."""
    pattern = re.compile(rf"\b{re.escape(word)}\b")
    return [float(pattern.search(text.lower()) is not None) for text in texts_of(completions)]


def near_length(completions: Sequence[Completion], *, characters: int, **columns: Any) -> list[float]:
    """Shaped by length: 0 at `characters` characters, -1 at none and at twice as many."""
    return [-abs(len(text) - characters) / characters for text in texts_of(completions)]


def cheerful_words(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Number of cheerful words, which the grid's simulated raters prefer."""
    return [float(len(CHEERFUL.findall(text.lower()))) for text in texts_of(completions)]


def scaled(reward: RewardFunction, scale: float, shift: float = 0.0) -> RewardFunction:
    """Return the same reward in other units: times `scale`, plus `shift`."""

    def in_other_units(completions: Sequence[Completion], **columns: Any) -> list[float]:
        return [scale * value + shift for value in reward(completions, **columns)]

    return in_other_units
