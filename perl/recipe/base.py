"""The section `base`: which model is frozen under all roles."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from perl.recipe.section import Positive, Rate, Section

ORIGINS = {"model": ("trust_remote_code",), "build": (), "config": ("random_init",)}
"""Keys of `base` that say where it comes from, one of which a recipe has, and those that only go with them."""


class Build(Section):
    """A tiny base, trained by the recipe itself on the source's dialogues, and cached."""

    architecture: Literal["llama", "t5"] = "llama"
    """A decoder, or an encoder-decoder."""
    hidden_size: Positive = 128
    """Hidden size."""
    layers: Positive = 3
    """Number of blocks; for t5, of encoder and decoder each."""
    heads: Positive = 4
    """Attention heads per block."""
    vocabulary: Positive = 512
    """Size of the byte-level BPE vocabulary, trained on the same dialogues."""
    max_length: Positive = 512
    """Context length, in tokens."""
    steps: Positive = 1500
    """Training steps of the base."""
    batch_tokens: Positive = 1536
    """Tokens per training step."""
    learning_rate: Rate | None = None
    """Peak learning rate for training the base. Unset: 3e-3 for llama; for t5, trained by Adafactor, 0.03 times
    the size of each weight."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the base only: like a pretrained model, it stays the same when the run's seed changes."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Build":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even multiple of heads {self.heads}: "
                f"choose a multiple of {2 * self.heads}"
            )
        return self


class Base(Section):
    """The frozen base that all roles share."""

    model: str | None = None
    """A hub id or a folder with a causal language model."""
    build: Build | None = None
    config: dict[str, JsonValue] | None = None
    """A transformers configuration with its `model_type`; needs `random_init: true`."""
    random_init: bool = False
    """Take only the configuration and initialise the weights at random: for measurements, not for use."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the base's weights and of computations with them."""
    quantization: Literal["none", "4bit"] = "none"
    """4bit: NF4 by bitsandbytes, as in QLoRA (docs/quantization.md)."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the model, if transformers has none for it. Read that code
    first."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Base":
        if sum(origin is not None for origin in (self.model, self.build, self.config)) != 1:
            raise ValueError("a base is exactly one of model, build and config: give one of them alone")
        if self.config is not None and not self.random_init:
            raise ValueError("config has no weights: add random_init: true, or give model instead")
        if self.trust_remote_code and self.model is None:
            raise ValueError("trust_remote_code is about a model's own code: give model, or leave it out")
        return self
