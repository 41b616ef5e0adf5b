"""Predicted peak memory of a recipe's stages: the real steps, run on fake tensors.

The code that trains a stage takes two steps on the longest rows of its data (`Trial`), with a base that has every
shape and no weights. There is no second model of memory that could drift from the code.

A deep base is tried at two smaller depths, and each kind of memory is extrapolated linearly: layers are all alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from perl.adapters.targets import linear_layers
from perl.backbones import backbone_of
from perl.backbones.fake import fake_lm
from perl.measure.probe import KINDS, PHASES, Kind, Phase, PhaseMemory
from perl.predict.stages import TRY
from perl.predict.subject import Subject, fake_session
from perl.recipe import Recipe, StageName
from perl.recipe.adapter import LORA

DEPTHS = (2, 6)
"""Layers that a deeper base is tried at."""
FOUR_BIT_BYTES = 0.5 + 4 / 64
"""Of an NF4 weight: four bits, and a 4-byte scale for every 64 of them."""

Memory = dict[Phase, PhaseMemory]


def predict(recipe: Recipe, subject: Subject) -> dict[StageName, Memory]:
    """Peak memory of every stage of a recipe, by phase and kind, in bytes.

    Args:
        subject: of this recipe, or of one with the same base, data and seed.
    """
    # Where layers are unfrozen one by one, the peak is that of the epochs in which all learn.
    full = recipe.full.model_copy(update={"gradual_unfreezing": False})
    recipe = recipe.model_copy(update={"full": full})
    if getattr(recipe.adapter_settings, "layers", None) == list(range(subject.depth)):
        recipe = _with_layers(recipe, "all")
    # Of layers named one by one, and of kinds that nothing is known of, no smaller depth stands for the whole.
    whole = not isinstance(getattr(recipe.adapter_settings, "layers", None), str)
    if whole or subject.depth <= max(DEPTHS):
        predicted = _predict_at(recipe, subject, subject.depth)
    else:
        low, high = (_predict_at(recipe, subject, depth) for depth in DEPTHS)
        share = (subject.depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        predicted = {stage: _extend(low[stage], high[stage], share) for stage in low}
    if recipe.base.quantization == "4bit":
        size = weight_sizes(subject.config, getattr(torch, recipe.base.dtype))
        change: dict[Kind, float] = {
            "base_weights": -size.linear * (1 - FOUR_BIT_BYTES / size.bytes_each),
            "activations": size.largest,  # a layer's weights in the base's dtype, while it computes
        }
        predicted = {stage: changed(memory, change) for stage, memory in predicted.items()}
    return predicted


def _with_layers(recipe: Recipe, layers: str) -> Recipe:
    content = recipe.model_dump()
    content[LORA if recipe.adapter is None else "adapter"]["layers"] = layers
    return Recipe.model_validate(content)


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a base's weights."""

    bytes_each: int
    linear: int
    """Of all linear layers inside the blocks: what 4-bit quantization and LoRA act on."""
    largest: int
    """Of the largest of them."""
    block: int
    """Of one block, on average."""
    outside: int
    """Of the embeddings, the head and the last norm."""


def weight_sizes(config: Any, dtype: torch.dtype) -> WeightSizes:
    """The sizes of a base's weights, from its configuration."""
    lm = fake_lm(config, dtype)
    linear = [lm.get_submodule(name).weight.nbytes for name in linear_layers(lm)]
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())  # an encoder has no output embeddings
    outside = sum(
        {id(end.weight): end.weight.nbytes for end in ends if end is not None}.values()
    )  # tied ones once
    blocks = sum(parameter.nbytes for parameter in lm.parameters()) - outside
    depth = backbone_of(config).depth
    return WeightSizes(dtype.itemsize, sum(linear), max(linear), blocks // depth, outside)


def changed(memory: Memory, change: Mapping[Kind, float]) -> Memory:
    """Memory with so many more bytes of some kinds in every phase; nothing is computed while loading."""
    result: Memory = {}
    for phase, peak in memory.items():
        kinds = dict(peak.kinds)
        for kind, count in change.items():
            if phase != "load" or kind != "activations":
                kinds[kind] = round(kinds.get(kind, 0) + count)
        result[phase] = PhaseMemory(sum(kinds.values()), kinds)
    return result


def _extend(low: Memory, high: Memory, share: float) -> Memory:
    """The line through two depths, so many times their distance above the lower."""
    extended: Memory = {}
    for phase in (phase for phase in PHASES if phase in low):
        kinds: dict[Kind, int] = {}
        for kind in KINDS:
            start, end = (memory[phase].kinds.get(kind, 0) for memory in (low, high))
            if size := max(0, round(start + share * (end - start))):
                kinds[kind] = size
        extended[phase] = PhaseMemory(sum(kinds.values()), kinds)
    return extended


def _predict_at(recipe: Recipe, subject: Subject, depth: int) -> dict[StageName, Memory]:
    memory: dict[StageName, Memory] = {}
    for stage in recipe.stages:
        with fake_session(recipe, subject, depth) as session:
            memory[stage] = TRY[stage](session).memory
    return memory
