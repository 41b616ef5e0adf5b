"""Predicted peak memory of a recipe's stages: the real steps, run on fake tensors.

A stage is tried for two steps by the code that trains it, on the longest rows of its data (`Trial`), with a base
that has every shape and no weights. Nothing is modelled beside the code, so nothing can drift from it.

A deep base is tried at two smaller depths, and each kind of memory is drawn on along the straight line through
them: layers are all alike, so what they hold is proportional to their number.
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from perl.data.records import Records
from perl.measure.ledger import KINDS, PHASES, PhaseMemory
from perl.measure.probe import Kind, Phase
from perl.model.base import Base, load_config, load_tokenizer, numbered_tokens
from perl.model.build import tiny_config, train_tokenizer
from perl.model.chat import ChatFormat
from perl.model.fake import FakeSeparateModels, FakeSharedBase, fake_lm, unknown_values
from perl.model.roles import Roles
from perl.pipeline import TRAIN
from perl.progress import silence
from perl.recipe import Recipe, StageName
from perl.rundir import RunFolder
from perl.stages.session import (
    Session,
    Trial,
    adapter_shape,
    corpus,
    quiet_libraries,
    read_data,
    seed_everything,
)

DEPTHS = (8, 12)
"""Layers that a deeper base is tried at."""
STEPS = 2
"""The first step makes gradients and the optimizer's state; in the second all of them are there from the start."""

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
            train,
            held_out,
        )
    if spec.config is not None:
        config = AutoConfig.for_model(**spec.config)
        return Subject(config, numbered_tokens(config.get_text_config().vocab_size), train, held_out)
    assert spec.model is not None
    return Subject(load_config(spec.model), load_tokenizer(spec.model), train, held_out)


def predict(recipe: Recipe, subject: Subject) -> dict[StageName, Memory]:
    """Peak memory of every stage of a recipe, by phase and kind, in bytes.

    Args:
        subject: of this recipe, or of one with the same base, data and seed.
    """
    whole = isinstance(recipe.lora.layers, list)  # layers named one by one: no smaller depth stands for them
    if whole or subject.depth <= max(DEPTHS):
        return _predict_at(recipe, subject, subject.depth)
    low, high = (_predict_at(recipe, subject, depth) for depth in DEPTHS)
    share = (subject.depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return {stage: _extend(low[stage], high[stage], share) for stage in low}


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
                result = TRAIN[stage](session)
        memory[stage] = {
            name: PhaseMemory(phase["peak"], phase["kinds"]) for name, phase in result["memory"].items()
        }
    return memory


def _session(recipe: Recipe, subject: Subject, depth: int, scratch: Path) -> Session:
    config = copy.deepcopy(subject.config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    lm = fake_lm(config, getattr(torch, recipe.base.dtype))
    full = recipe.tuning == "full"
    roles: Roles = FakeSeparateModels(lm) if full else FakeSharedBase(lm, adapter_shape(recipe, lm))
    base = Base(
        name="no weights",
        tokenizer=subject.tokenizer,
        chat=ChatFormat(subject.tokenizer),
        sha256="",
        parameters=sum(parameter.numel() for parameter in lm.parameters()),
        context_length=int(getattr(text, "max_position_embeddings", 2**31)),
        load=lambda: lm,
    )
    trial = Trial(STEPS, abridged=True)
    device = torch.device("cpu")
    return Session(recipe, RunFolder(scratch), subject.train, subject.held_out, base, roles, device, trial)
