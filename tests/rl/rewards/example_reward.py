"""A kind of reward of one's own: the share of some words that a completion mentions (example_reward.yaml)."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from perl.rl.rewards import REWARDS, RewardContext, RewardPart, RewardSource


class Keywords(RewardSource):
    """The share of the words that a completion contains."""

    name = "keywords"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def rewards(self, prompts: object, samples: object, texts: Sequence[str]) -> list[float]:
        return [sum(word in text.lower() for word in self._words) / len(self._words) for text in texts]


class KeywordsPart(RewardPart):
    """The settings in the recipe, and what they make."""

    words: Annotated[list[str], Field(min_length=1)]

    def source(self, context: RewardContext) -> RewardSource:
        return Keywords(self.words)


REWARDS["keywords"] = KeywordsPart
