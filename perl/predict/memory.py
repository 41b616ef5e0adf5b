"""Prediction of the peak memory and the operations of a recipe's stages: real steps, run on fake tensors.

The training code of a stage takes two steps on the longest rows of its data (`Trial`), with a base that has all
shapes but no weights. There is no separate memory model that could diverge from the code.

A deep base is run at two smaller depths, and each kind of memory and of operation is extrapolated linearly, if its
weights are on the line through both, as when all layers are the same (`Subject.depths`).
"""

import gc
from collections.abc import Mapping
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

FOUR_BIT_BYTES = 0.5 + 4 / 64
"""Bytes per NF4 weight: four bits, and a 4-byte scale per 64 weights."""

Memory = dict[Phase, PhaseMemory]


@dataclass(frozen=True)
class Traced:
    """The memory and operations of a stage's steps."""

    memory: Memory
    work: dict[Phase, Work]
    """Operations of one step on the longest rows."""


def predict(recipe: Recipe, subject: Subject) -> dict[StageName, Memory]:
    """Return the peak memory of every stage of a recipe, by phase and kind, in bytes; see `trace`."""
    return {stage: trace(recipe, subject, stage).memory for stage in recipe.stages}


def trace(recipe: Recipe, subject: Subject, stage: StageName) -> Traced:
    """Return the peak memory of a stage by phase and kind, in bytes, and the operations of a step.

    Args:
        subject: from this recipe, or from one with the same base, data and seed.
    """
    # With gradual unfreezing, the peak is in the epochs in which all layers are trained.
    full = recipe.full.model_copy(update={"gradual_unfreezing": False})
    recipe = recipe.model_copy(update={"full": full})
    if getattr(recipe.adapter_settings, "layers", None) == list(range(subject.depth)):
        recipe = _on_all_layers(recipe)
    # If layers are listed individually, or the kind is unknown, no smaller depth is representative.
    whole = not isinstance(getattr(recipe.adapter_settings, "layers", None), str)
    depths = None if whole else subject.depths
    if depths is None:
        tried = _trial_at(recipe, subject, stage, subject.depth)
        traced = Traced(tried.memory, tried.work)
    else:
        low, high = (_trial_at(recipe, subject, stage, depth) for depth in depths)
        share = (subject.depth - depths[0]) / (depths[1] - depths[0])
        work = {
            phase: added(scaled(low.work[phase], 1 - share), scaled(high.work[phase], share)) for phase in low.work
        }
        traced = Traced(_extend(low, high, share), work)
    if recipe.base.quantization == "4bit":
        size = weight_sizes(subject.config, getattr(torch, recipe.base.dtype))
        change: dict[Kind, float] = {
            "base_weights": -size.linear * (1 - FOUR_BIT_BYTES / size.bytes_each),
            "activations": size.largest,  # one layer's dequantized weights during its computation
        }
        traced = Traced(changed(traced.memory, change), traced.work)
    return traced


def _on_all_layers(recipe: Recipe) -> Recipe:
    content = recipe.model_dump()
    content[LORA if recipe.adapter is None else "adapter"]["layers"] = "all"
    return Recipe.model_validate(content)


@dataclass(frozen=True)
class WeightSizes:
    """Sizes of a base's weights in bytes."""

    bytes_each: int
    linear: int
    """All linear layers inside the blocks, to which 4-bit quantization and LoRA apply."""
    largest: int
    """The largest of them."""
    block: int
    """One block, on average."""
    outside: int
    """The embeddings, the head and the last norm."""


def weight_sizes(config: Any, dtype: torch.dtype) -> WeightSizes:
    """Compute the sizes of a base's weights from its configuration."""
    lm = fake_lm(config, dtype)
    linear = [lm.get_submodule(name).weight.nbytes for name in linear_layers(lm)]
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())  # an encoder has no output embeddings
    # Tied weights count once.
    outside = sum({id(end.weight): end.weight.nbytes for end in ends if end is not None}.values())
    blocks = sum(parameter.nbytes for parameter in lm.parameters()) - outside
    depth = backbone_of(config).depth
    return WeightSizes(dtype.itemsize, sum(linear), max(linear), blocks // depth, outside)


def changed(memory: Memory, change: Mapping[Kind, float]) -> Memory:
    """Add bytes of some kinds to every phase, except activations while loading."""
    result: Memory = {}
    for phase, peak in memory.items():
        kinds = dict(peak.kinds)
        for kind, count in change.items():
            if phase != "load" or kind != "activations":
                kinds[kind] = round(kinds.get(kind, 0) + count)
        result[phase] = PhaseMemory(sum(kinds.values()), kinds)
    return result


def _extend(low: Tried, high: Tried, share: float) -> Memory:
    """Extrapolate linearly from two depths, `share` times their distance above the lower one.

    A phase's peak is either before all gradients exist or while they do, and which one may depend on the depth:
    each is extrapolated separately, and the higher one is used.
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


def _trial_at(recipe: Recipe, subject: Subject, stage: StageName, depth: int) -> Tried:
    with fake_session(recipe, subject, depth) as session:
        # Every measured step runs Python's garbage collector, which need not traverse what exists by now.
        gc.collect()
        gc.freeze()
        return TRY[stage](session)
