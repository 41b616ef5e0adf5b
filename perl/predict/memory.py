"""Predicted peak memory of a recipe's stages, and their operations: the real steps, run on fake tensors.

The code that trains a stage takes two steps on the longest rows of its data (`Trial`), with a base that has every
shape and no weights. There is no second model of memory that could drift from the code.

A deep base is tried at two smaller depths, and each kind of memory and of operation is extrapolated linearly:
layers are all alike.
"""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from perl.adapters.targets import linear_layers
from perl.backbones import backbone_of
from perl.backbones.fake import fake_lm
from perl.measure.probe import KINDS, PHASES, Kind, Phase, PhaseMemory
from perl.predict.counting import Work, added, scaled
from perl.predict.stages import TRY
from perl.predict.subject import Subject, fake_session
from perl.predict.trial import Tried
from perl.recipe import Recipe, StageName
from perl.recipe.adapter import LORA

DEPTHS = (2, 4)
"""Layers that a deeper base is tried at."""
FOUR_BIT_BYTES = 0.5 + 4 / 64
"""Of an NF4 weight: four bits, and a 4-byte scale for every 64 of them."""

Memory = dict[Phase, PhaseMemory]


@dataclass(frozen=True)
class Traced:
    """What a stage's steps are found to need."""

    memory: Memory
    work: dict[Phase, Work]
    """Of one step, on the longest rows."""


def predict(recipe: Recipe, subject: Subject) -> dict[StageName, Memory]:
    """Peak memory of every stage of a recipe, by phase and kind, in bytes; arguments as of `trace`."""
    return {stage: trace(recipe, subject, stage).memory for stage in recipe.stages}


def trace(recipe: Recipe, subject: Subject, stage: StageName) -> Traced:
    """Peak memory of a stage by phase and kind, in bytes, and the operations of a step.

    Args:
        subject: of this recipe, or of one with the same base, data and seed.
    """
    # Where layers are unfrozen one by one, the peak is that of the epochs in which all learn.
    full = recipe.full.model_copy(update={"gradual_unfreezing": False})
    recipe = recipe.model_copy(update={"full": full})
    if getattr(recipe.adapter_settings, "layers", None) == list(range(subject.depth)):
        recipe = _on_all_layers(recipe)
    # Of layers named one by one, and of kinds that nothing is known of, no smaller depth stands for the whole.
    whole = not isinstance(getattr(recipe.adapter_settings, "layers", None), str)
    if whole or subject.depth <= max(DEPTHS):
        tried = _try_at(recipe, subject, stage, subject.depth)
        traced = Traced(tried.memory, tried.work)
    else:
        low, high = (_try_at(recipe, subject, stage, depth) for depth in DEPTHS)
        share = (subject.depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        work = {
            phase: added(scaled(low.work[phase], 1 - share), scaled(high.work[phase], share)) for phase in low.work
        }
        traced = Traced(_extend(low, high, share), work)
    if recipe.base.quantization == "4bit":
        size = weight_sizes(subject.config, getattr(torch, recipe.base.dtype))
        change: dict[Kind, float] = {
            "base_weights": -size.linear * (1 - FOUR_BIT_BYTES / size.bytes_each),
            "activations": size.largest,  # a layer's weights in the base's dtype, while it computes
        }
        traced = Traced(changed(traced.memory, change), traced.work)
    return traced


def _on_all_layers(recipe: Recipe) -> Recipe:
    content = recipe.model_dump()
    content[LORA if recipe.adapter is None else "adapter"]["layers"] = "all"
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


def _extend(low: Tried, high: Tried, share: float) -> Memory:
    """The lines through two depths, so many times their distance above the lower.

    A phase's peak is before there are all gradients or while there are, and not at every depth the same of both:
    each has a line of its own, and the higher one counts.
    """
    moments = list(zip(low.around_gradients, high.around_gradients, strict=True))
    extended: Memory = {}
    for phase in (phase for phase in PHASES if phase in low.memory):
        lines = [(start[phase], end[phase]) for start, end in moments if phase in start and phase in end]
        first, last = max(lines, key=lambda line: line[0].peak + share * (line[1].peak - line[0].peak))
        kinds: dict[Kind, int] = {}
        for kind in KINDS:
            start, end = (peak.kinds.get(kind, 0) for peak in (first, last))
            if size := max(0, round(start + share * (end - start))):
                kinds[kind] = size
        extended[phase] = PhaseMemory(sum(kinds.values()), kinds)
    return extended


def _try_at(recipe: Recipe, subject: Subject, stage: StageName, depth: int) -> Tried:
    with fake_session(recipe, subject, depth) as session, _libraries_uncollected():
        return TRY[stage](session)


@contextlib.contextmanager
def _libraries_uncollected() -> Iterator[None]:
    """Inside, Python's collector, which runs at every measured step, leaves out what is there already."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
