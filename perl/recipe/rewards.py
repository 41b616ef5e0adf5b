"""The key `rl.reward`: where the RL reward comes from, one source or the weighted sum of several.

    reward: {}                               the reward stage's model
    reward: {function: FILE.py:NAME}         a function; time_limit, own_process and weight may be added
    reward:                                  several, each of a kind of `REWARDS`
      - {kind: model}
      - {kind: length, target: 40, weight: 0.01}

Their settings are in reward_parts.py.
"""

from typing import Annotated, Any, Literal

from pydantic import PlainValidator, SerializeAsAny, TypeAdapter

from perl.recipe.reward_parts import FunctionPart, ModelPart, RewardPart, registered_kind
from perl.recipe.section import Section


class RewardFrom(Section):
    """The short form of one source; empty means the reward stage's model."""

    function: str | None = None
    """FILE.py:NAME, called as TRL calls reward functions."""

    @classmethod
    def variant(cls, given: Any) -> type[Section]:
        if not isinstance(given, dict):
            return cls
        if "kind" in given:
            return part_settings(given)
        return FunctionPart if "function" in given and len(given) > 1 else cls

    @property
    def part(self) -> RewardPart:
        if self.function is None:
            return ModelPart(kind="model")
        return FunctionPart(kind="function", function=self.function)


def part_settings(given: Any) -> type[RewardPart]:
    """Return the settings class of the given kind, or the base class if there is no such kind."""
    return (registered_kind(given.get("kind")) if isinstance(given, dict) else None) or RewardPart


def _part(given: Any) -> RewardPart:
    return part_settings(given).model_validate(given)


_PARTS = TypeAdapter(list[Annotated[RewardPart, PlainValidator(_part)]])


def _rewards(given: Any) -> Section | list[RewardPart]:
    if given == []:
        raise ValueError("an empty list is not a reward: list the kinds of reward, or leave the key out")
    if isinstance(given, list):
        return _PARTS.validate_python(given)
    settings = RewardFrom.variant(given)
    return settings.model_validate({"kind": "function", **given} if settings is FunctionPart else given)


def reward_parts(reward: Any) -> list[RewardPart]:
    """Return a value of the key in its long form."""
    if isinstance(reward, list):
        return reward
    return [reward.part if isinstance(reward, RewardFrom) else reward]


def _eval_reward(given: Any) -> str | Section | list[RewardPart]:
    if not isinstance(given, str):
        return _rewards(given)
    if given != "gold":
        raise ValueError(f"{given!r} is not a reward to choose by: write gold, or a reward as in rl.reward")
    return given


Rewards = Annotated[SerializeAsAny[RewardFrom | RewardPart | list[RewardPart]], PlainValidator(_rewards)]
"""Validated by hand, like the next one, because a union's members are fixed and those of `REWARDS` are not."""
EvalReward = Annotated[
    SerializeAsAny[Literal["gold"] | RewardFrom | RewardPart | list[RewardPart]], PlainValidator(_eval_reward)
]
