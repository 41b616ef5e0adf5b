"""The base class of all sections of a recipe, the types of their values, and the keys on validation."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LrSchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
"""Learning rate schedules, by transformers' names: those that need no further arguments and do not equal another
schedule without them. All but `constant` have a warmup."""


def registered(registry: Mapping[str, Any]) -> AfterValidator:
    """Return a validator of names in a registry, to which plugins may have added."""

    def check(name: str) -> str:
        if name not in registry:
            *others, last = map(repr, registry)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """A part of a recipe: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, serialize_by_alias=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `eval_steps: on`, which would be 1; `best_of_n: off` is 0."""
        types = set(_types(cls.model_fields[info.field_name or ""].annotation)) if value is True else set()
        if types & {int, float} and bool not in types:
            raise PydanticKnownError("float_type")
        return value

    @classmethod
    def variant(cls, given: Any) -> "type[Section]":
        """Return the section whose keys a value must have, if that depends on the value."""
        return cls


def _types(annotation: Any) -> Iterator[Any]:
    """Yield the members of a type, at any depth, and the type itself."""
    yield annotation
    for member in get_args(annotation):
        yield from _types(member)


def nearest(name: str, valid: Collection[str]) -> str:
    """Return what to write instead of an unknown name of a registry."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(valid)}"


def addresses(url: str | list[str] | None) -> tuple[str, ...]:
    """Return the addresses of servers, without a slash at the end.

    Raises:
        ValueError: one of them is not an address.
    """
    urls = tuple(one.rstrip("/") for one in ([url] if isinstance(url, str) else url or []))
    for one in urls:
        if not _is_address(one):
            raise ValueError(f"{one!r} is not an address of a server: write url as in http://127.0.0.1:8000")
        if one.endswith("/v1"):
            raise ValueError(f"{one!r} ends in /v1, which is added automatically: leave it out")
    return urls


def _is_address(url: str) -> bool:
    try:
        return bool(re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url)) and urlsplit(url).port != 0
    except ValueError:  # a port beyond 65535, half an IPv6 address
        return False


class Validation(Section):
    """The keys on validation, which all stages have."""

    eval_steps: Positive | None = None
    """Steps between validations on rows that are split off the training rows by dialogue, never the held-out rows.
    The criterion is the loss (for reward models, at the temperature that fits their scores best); for RL see
    `eval_reward`. The best weights are kept. Unset: no validation, and the last weights are kept."""
    early_stopping_patience: Positive | None = None
    """The stage ends after this many validations in a row without improvement. Unset: it takes all its steps."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training dialogues used for validation, if `eval_steps` is set."""

    @model_validator(mode="after")
    def _validates(self) -> "Validation":
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience counts validations, and there are none: set eval_steps")
        return self
