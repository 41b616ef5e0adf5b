"""The section `lora`: the shape of the adapters."""

from typing import Annotated, Literal

from pydantic import Field

from perl.recipe.section import Positive, Section


class Lora(Section):
    """The adapters: the same shape for every role."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are zeroed in the training passes of SFT and of the reward model. Never in
    RL: there the policy that learns has to be the one that sampled. The base's own dropout is off everywhere."""
    targets: Literal["attention", "all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: attention projections (the paper), all linear layers and experts, or names. The
    share of the blocks' weights that is covered is said at the start and in the report."""
    layers: Literal["all", "top-half"] | list[Annotated[int, Field(ge=0)]] = "all"
