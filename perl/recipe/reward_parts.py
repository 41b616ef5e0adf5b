"""The kinds of reward: the settings of each in a recipe, and what scores completions with them.

A kind is a class of settings, which creates the reward source. This file does not import torch, so that recipes
are read quickly.
"""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from perl.data.answers import AnswerKind
from perl.measure.ensemble import Combine
from perl.recipe.section import NonNegative, Positive, Section, addresses, nearest

if TYPE_CHECKING:
    from perl.rl.rewards.base import RewardContext, RewardSource


class RewardPart(Section):
    """A part of the reward. Your own kind is a subclass with further settings and `source`."""

    kind: Annotated[str, Field(validate_default=True)] = ""
    """A name in `REWARDS`."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Weight of this part in the sum."""

    needs_model: ClassVar[bool] = False
    """Whether the source needs the reward stage's model."""

    def source(self, context: "RewardContext") -> "RewardSource":
        """Create what scores completions with these settings, before any training unless it needs the model.

        Raises:
            UserError: something that the settings name cannot be used.
        """
        raise NotImplementedError

    @field_validator("kind")
    @classmethod
    def _is_registered_kind(cls, kind: str) -> str:
        if registered_kind(kind) is None:
            raise ValueError(f"no kind of reward {kind!r}: {nearest(kind, REWARDS)}")
        return kind

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a part of weight 0 has no effect: give another weight, or leave the part out")
        return weight


class ModelPart(RewardPart):
    """The reward stage's model, as `perl.rl.rewards.model` centres and scales it."""

    members: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Which of `reward.members` to use, counted from 1. Unset: all of them."""
    combine: Combine = "mean"
    """How to combine the members' rewards: their mean, their mean minus `std_weight` times their standard
    deviation, or their minimum."""
    std_weight: NonNegative = 1.0
    """λ of mean_minus_std."""

    needs_model = True

    def source(self, context: "RewardContext") -> "RewardSource":
        return context.model(self.members, self.combine, self.std_weight)

    @model_validator(mode="after")
    def _combines_several(self) -> "ModelPart":
        if self.members is not None and len(set(self.members)) < len(self.members):
            raise ValueError("members names one of them twice: give each once")
        if self.combine != "mean_minus_std" and "std_weight" in self.model_fields_set and self.std_weight != 1.0:
            raise ValueError(f"combine {self.combine} has no std_weight: leave it out, or set mean_minus_std")
        return self

    def numbers(self, trained: int) -> list[int]:
        """Return the numbers of the members in use, out of `trained`."""
        return self.members or [*range(1, trained + 1)]

    def refusal(self, trained: int) -> str | None:
        """Return why this part cannot be made from `trained` members; None if it can."""
        if self.members is not None and max(self.members) > trained:
            return f"there is no member {max(self.members)}: reward.members is {trained}"
        if self.combine != "mean" and len(self.numbers(trained)) < 2:
            return f"combine {self.combine} needs several members: set reward.members to at least 2"
        return None


class RunPart(RewardPart):
    """The reward model of another run, on that run's base, which is loaded in addition to this one's.

    So the policy's adapters may be of another kind than the reward model's.
    """

    run: str
    """Folder of a run whose reward stage is finished; its base must have the same tokenizer as this one."""

    def source(self, context: "RewardContext") -> "RewardSource":
        return context.model_of(self.run)


class ServerPart(RewardPart):
    """A reward model on a vLLM server, possibly on another machine; docs/serving.md says how to start it.

    If the recipe has a section `reward`, the server's scores are compared with those of that model (of an
    ensemble, the first member), and its scale is used.
    """

    url: str | list[str]
    """Address of a server, or of several that serve the same. VLLM_API_KEY is sent if the environment has it."""
    model: str = "reward"
    """Name of the reward model on the server."""
    probability: bool = False
    """Whether the reward is the sigmoid of the score, as it should be for a model trained on thumbs. With a
    section `reward` this follows from its model."""
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds that a server may take to score 16 completions."""
    patience: NonNegative = 600.0
    """Seconds to wait for a server that does not answer."""
    in_flight: Positive = 32
    """Concurrent requests per process."""
    mismatch_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest difference allowed between a server's score and that of the reward model here, or its own earlier
    one; beyond it the run ends. Unset: 0.001 in float32, 0.1 in 16 bits."""

    def source(self, context: "RewardContext") -> "RewardSource":
        from perl.rl.rewards.base import RewardServers

        named = self.model_dump(exclude={"kind", "weight", "url"})
        return context.served(RewardServers(addresses(self.url), **named))

    @field_validator("url")
    @classmethod
    def _are_addresses(cls, url: str | list[str]) -> str | list[str]:
        if not addresses(url):
            raise ValueError("a server needs a url: set url, such as to http://127.0.0.1:8001")
        return url


class FunctionPart(RewardPart):
    """A function of the user."""

    function: str
    """FILE.py:NAME, called as TRL calls reward functions."""
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds that a call may take; a longer one ends the run. C code can only be interrupted with
    `own_process`."""
    own_process: bool = False
    """Whether to call the function in a separate process, so that its crashes or memory do not affect the run."""

    def source(self, context: "RewardContext") -> "RewardSource":
        from perl.rl.rewards.function import RewardFunction

        return RewardFunction(self.function, context.prompts, self.time_limit, self.own_process)


class LengthPart(RewardPart):
    """The length of the completion in tokens, including its end token."""

    target: Positive | None = None
    """The reward is minus the distance to this length. Unset: it is the length itself."""

    def source(self, context: "RewardContext") -> "RewardSource":
        from perl.rl.rewards.length import Length

        return Length(self.target)


class MathPart(RewardPart):
    """1 if the answer equals the reference, else 0; see `perl.data.answers`."""

    answer: AnswerKind = "number"
    """number: the last number in the completion; letter: its first letter from A to E; latex: compared by the
    package math-verify."""
    column: str = "answer"
    """Field of the rows that contains the reference answer."""

    def source(self, context: "RewardContext") -> "RewardSource":
        from perl.rl.rewards.rules import Math

        return Math(self.answer, self.column, context.prompts)


class RegexPart(RewardPart):
    """1 if the pattern is found in the completion, else 0."""

    pattern: str
    """Pattern of Python's module `re`. `(?s)\\A…\\Z` matches the whole completion."""

    def source(self, context: "RewardContext") -> "RewardSource":
        from perl.rl.rewards.rules import Regex

        return Regex(self.pattern)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern


class JsonSchemaPart(RewardPart):
    """1 if the whole completion is JSON that the schema allows, else 0."""

    json_schema: dict[str, JsonValue]
    """Schema for the package jsonschema; without `$schema` it is draft 2020-12."""

    def source(self, context: "RewardContext") -> "RewardSource":
        from perl.rl.rewards.rules import JsonSchema

        return JsonSchema(self.json_schema)


REWARDS: dict[str, type[RewardPart]] = {
    "model": ModelPart,
    "run": RunPart,
    "server": ServerPart,
    "function": FunctionPart,
    "length": LengthPart,
    "math": MathPart,
    "regex": RegexPart,
    "json_schema": JsonSchemaPart,
}
"""The kinds by name; a plugin can add its own."""


def registered_kind(kind: Any) -> type[RewardPart] | None:
    """Return a kind's settings class; None if there is no such kind."""
    row = REWARDS.get(kind) if isinstance(kind, str) else None
    return row if isinstance(row, type) and issubclass(row, RewardPart) else None
