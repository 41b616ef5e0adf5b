"""The section `base`: the frozen model that all roles share."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from perl.recipe.section import Positive, Rate, Section

ORIGINS = {"model": ("trust_remote_code",), "build": (), "config": ("random_init",)}
"""Keys of `base` that say where the model comes from, exactly one per recipe, and the keys that only go with
them."""


class Build(Section):
    """A tiny base, which the recipe itself trains on the source's dialogues and caches."""

    architecture: Literal["llama", "t5"] = "llama"
    """llama: a decoder; t5: an encoder-decoder."""
    hidden_size: Positive = 128
    """Hidden size."""
    layers: Positive = 3
    """Number of blocks; for t5, in the encoder and in the decoder each."""
    heads: Positive = 4
    """Attention heads per block."""
    vocabulary: Positive = 512
    """Size of the byte-level BPE vocabulary, trained on the same dialogues."""
    max_length: Positive = 512
    """Context length, in tokens."""
    steps: Positive = 1500
    """Training steps."""
    batch_tokens: Positive = 1536
    """Tokens per training step."""
    learning_rate: Rate | None = None
    """Learning rate for training the base. Unset: 3e-3 for llama; for t5, which is trained with Adafactor, 0.03
    relative to each weight's size."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the base only: like a pretrained model, the base stays the same when the run's seed changes."""

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
    """A hub id or a folder with a model of a supported family (docs/models.md)."""
    build: Build | None = None
    config: dict[str, JsonValue] | None = None
    """A transformers configuration with its `model_type`; needs `random_init: true`."""
    random_init: bool = False
    """Take only the configuration and initialize the weights at random: for measurements, not for use."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the base's weights and of computations with them."""
    quantization: Literal["none", "4bit"] = "none"
    """4bit: NF4 with bitsandbytes, as in QLoRA (docs/quantization.md)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model, if transformers does not implement it. Read that code
    first."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Base":
        if sum(origin is not None for origin in (self.model, self.build, self.config)) != 1:
            raise ValueError("a base is exactly one of model, build and config: give only one of them")
        if self.config is not None and not self.random_init:
            raise ValueError("config has no weights: add random_init: true, or give model instead")
        if self.trust_remote_code and self.model is None:
            raise ValueError("trust_remote_code is for the code of a model: give model, or leave it out")
        return self
