"""What all sections of a recipe are, and the types of their values."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LrSchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
"""How the learning rate goes over a stage, by transformers' names: those that need no further arguments and are
not another one without them. All but `constant` warm up."""


class Section(BaseModel):
    """A part of a recipe: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
