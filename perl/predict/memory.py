"""Predicted peak memory of a recipe's stages: the real steps, run on fake tensors.

A stage is tried for two steps by the code that trains it, on the longest rows of its data (`Trial`), with a base
that has every shape and no weights. Nothing is modelled beside the code, so nothing can drift from it.

A deep base is tried at two smaller depths, and each kind of memory is drawn on along the straight line through
them: layers are all alike, so what they hold is proportional to their number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perl.adapters.targets import linear_layers
from perl.backbones.fake import fake_lm
from perl.measure.probe import KINDS, PHASES, Kind, Phase, PhaseMemory
from perl.predict.stages import TRY
from perl.predict.subject import Subject, fake_session
from perl.recipe import Recipe, StageName

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
    everything = sum(parameter.nbytes for parameter in lm.parameters())
    outside = {id(p): p.nbytes for p in (lm.get_input_embeddings().weight, *_output_weights(lm))}
    blocks = everything - sum(outside.values())
    depth = config.get_text_config().num_hidden_layers
    return WeightSizes(dtype.itemsize, sum(linear), max(linear), blocks // depth, sum(outside.values()))


def _output_weights(lm: PreTrainedModel) -> list[Tensor]:
    head = lm.get_output_embeddings()
    return [] if head is None else [head.weight]  # an encoder has none


def changed(memory: Memory, change: Mapping[Kind, float]) -> Memory:
    """Memory with so many bytes more (or fewer) of some kinds in every phase."""
    result: Memory = {}
    for phase, peak in memory.items():
        kinds = dict(peak.kinds)
        for kind, count in change.items():
            if phase != "load" or kind != "activations":  # nothing is computed in it
                kinds[kind] = round(kinds.get(kind, 0) + count)
        result[phase] = PhaseMemory(sum(kinds.values()), kinds)
    return result


def _extend(low: Memory, high: Memory, share: float) -> Memory:
    """The line through two depths, so many times their distance above the lower."""
    extended: Memory = {}
    for phase in PHASES:
        if phase in low:
            one, other = low[phase].kinds, high[phase].kinds
            kinds: dict[Kind, int] = {}
            for kind in KINDS:
                start = one.get(kind, 0)
                if end := max(0, round(start + share * (other.get(kind, 0) - start))):
                    kinds[kind] = end
            extended[phase] = PhaseMemory(sum(kinds.values()), kinds)
    return extended


def _predict_at(recipe: Recipe, subject: Subject, depth: int) -> dict[StageName, Memory]:
    memory: dict[StageName, Memory] = {}
    for stage in recipe.stages:
        with fake_session(recipe, subject, depth) as session:
            memory[stage] = TRY[stage](session).memory
    return memory
