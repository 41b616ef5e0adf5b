"""Predicted peak memory of a recipe's stages: the real steps, run on fake tensors.

A stage is tried for two steps by the code that trains it, on the longest rows of its data (`Trial`), with a base
that has every shape and no weights. Nothing is modelled beside the code, so nothing can drift from it.

A deep base is tried at two smaller depths, and each kind of memory is drawn on along the straight line through
them: layers are all alike, so what they hold is proportional to their number.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from perl.adapters.targets import linear_layers
from perl.backbones import backbone_of
from perl.backbones.base import Base
from perl.backbones.build import tiny_config, train_tokenizer
from perl.backbones.fake import fake_lm, unknown_values
from perl.backbones.loading import load_config, load_tokenizer, numbered_tokens
from perl.commands.run import TRAIN
from perl.data.records import Records
from perl.measure.probe import KINDS, PHASES, Kind, Phase, PhaseMemory
from perl.predict_rl import try_rl
from perl.recipe import Recipe, StageName
from perl.roles.fake import FakeSeparateModels, FakeSharedBase
from perl.roles.roles import Roles
from perl.runs.folder import RunFolder
from perl.stages.material import corpus, generates, quiet_libraries, read_data
from perl.stages.session import Session, Trial, adapters_for
from perl.system.progress import silence
from perl.system.seeds import seed_everything

DEPTHS = (2, 6)
"""Layers that a deeper base is tried at."""
STEPS = 2
"""The first step makes gradients and the optimizer's state; in the second all of them are there from the start."""

FOUR_BIT_BYTES = 0.5 + 4 / 64
"""Of an NF4 weight: four bits, and a 4-byte scale for every 64 of them."""
ROWS = 128
"""Records of each kind that a stage is tried on, the longest."""

Memory = dict[Phase, PhaseMemory]


@dataclass(frozen=True)
class Subject:
    """What all predictions for one recipe and its variations share."""

    config: Any
    """The base's, as transformers has it."""
    tokenizer: PreTrainedTokenizerBase
    train: Records
    held_out: Records

    @property
    def depth(self) -> int:
        """Layers of the base."""
        return int(self.config.get_text_config().num_hidden_layers)


def _longest(records: Records) -> Records:
    """The records that decide the peak, in characters: most are never looked at in two steps."""

    def size(turns: Any) -> int:
        return sum(len(turn.text) for turn in turns)

    def top(rows: Sequence[Any], key: Callable[[Any], int]) -> list[Any]:
        return sorted(rows, key=key, reverse=True)[:ROWS]

    ratings = [
        rating
        for label in (True, False)  # a reward model needs both
        for rating in top(
            [one for one in records.ratings if one.label is label], lambda one: size((*one.context, one.answer))
        )
    ]
    return replace(
        records,
        demonstrations=top(records.demonstrations, lambda one: size((*one.context, *one.answer))),
        ratings=ratings,
        comparisons=top(
            records.comparisons,
            lambda one: size(one.context) + max(len(one.better.text), len(one.worse.text)),
        ),
        prompts=top(records.prompts, lambda one: size(one.context)),
        corpus=[],
    )


def read_subject(recipe: Recipe) -> Subject:
    """The data, the tokenizer and the configuration of a recipe: all but weights.

    Raises:
        UserError: any of them cannot be used.
    """
    quiet_libraries()
    train, held_out = read_data(recipe)
    spec = recipe.base
    if spec.build is not None:
        made = spec.build
        tokenizer: Any = train_tokenizer(corpus(train), made.vocabulary)
        return Subject(
            tiny_config(tokenizer, made.hidden_size, made.layers, made.heads, made.max_length),
            tokenizer,
            _longest(train),
            _longest(held_out),
        )
    if spec.config is not None:
        config = AutoConfig.for_model(**spec.config)
        return Subject(
            config, numbered_tokens(config.get_text_config().vocab_size), _longest(train), _longest(held_out)
        )
    assert spec.model is not None
    config = load_config(spec.model, spec.trust_remote_code, generates=generates(recipe))
    tokenizer = load_tokenizer(spec.model, spec.trust_remote_code)
    return Subject(config, tokenizer, _longest(train), _longest(held_out))


def predict(recipe: Recipe, subject: Subject) -> dict[StageName, Memory]:
    """Peak memory of every stage of a recipe, by phase and kind, in bytes.

    Args:
        subject: of this recipe, or of one with the same base, data and seed.
    """
    # Of layers named one by one, and of kinds that nothing is known of, no smaller depth stands for the whole.
    whole = recipe.lora is None or isinstance(recipe.lora.layers, list)
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
        with tempfile.TemporaryDirectory() as scratch, silence():
            session = _session(recipe, subject, depth, Path(scratch))
            seed_everything(recipe.seed)
            with unknown_values():
                result = try_rl(session) if stage == "rl" else TRAIN[stage](session)
        memory[stage] = result.memory
    return memory


def _session(recipe: Recipe, subject: Subject, depth: int, scratch: Path) -> Session:
    config = copy.deepcopy(subject.config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    lm = fake_lm(config, getattr(torch, recipe.base.dtype))
    full = recipe.tuning == "full"
    roles: Roles = FakeSeparateModels(lm) if full else FakeSharedBase(adapters_for(recipe, lm))
    backbone = backbone_of(config)
    base = Base(
        name="no weights",
        tokenizer=subject.tokenizer,
        chat=backbone.chat_format(lm, subject.tokenizer),
        sha256="",
        parameters=sum(parameter.numel() for parameter in lm.parameters()),
        context_length=backbone.context_length(lm),
        load=lambda: lm,
    )
    trial = Trial(STEPS, abridged=True)
    device = torch.device("cpu")
    return Session(recipe, RunFolder(scratch), subject.train, subject.held_out, base, roles, device, trial)
