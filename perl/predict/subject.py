"""What predictions are made from: the longest rows of the data, a tokenizer, and a base of fake weights."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from perl.backbones import backbone_of
from perl.backbones.base import Base
from perl.backbones.build import tiny_config, train_tokenizer
from perl.backbones.fake import fake_lm, unknown_values
from perl.backbones.loading import load_config, load_tokenizer, numbered_tokens
from perl.data.records import Records, Turn
from perl.predict.trial import Trial, TrialSession, longest
from perl.recipe import Recipe, StageName
from perl.roles.fake import FakeSeparateModels, FakeSharedBase
from perl.roles.roles import Roles
from perl.runs.folder import RunFolder
from perl.stages.material import corpus, generates, quiet_libraries, read_data
from perl.stages.opening import adapters_for
from perl.system.progress import silence
from perl.system.seeds import seed_everything

STEPS = 2
"""The first makes gradients and the optimizer's state; in the second all of them are there from the start."""


TYPICAL = 64
"""Rows by which the usual length is found."""


@dataclass(frozen=True)
class Rows:
    """What a stage goes through."""

    train: int
    held_out: int
    longest: float
    """Tokens of a row that is tried, on average, before anything is cut off."""
    usual: float
    """Of all rows, on average."""


@dataclass(frozen=True)
class Subject:
    """What all predictions for one recipe and its variations share."""

    config: Any
    """The base's, as transformers has it."""
    tokenizer: PreTrainedTokenizerBase
    train: Records
    held_out: Records
    """Of both the longest rows of each kind."""
    sizes: dict[StageName, Rows]

    @property
    def depth(self) -> int:
        return backbone_of(self.config).depth


def read_subject(recipe: Recipe) -> Subject:
    """The data, the tokenizer and the configuration of a recipe.

    Raises:
        UserError: any of them cannot be used.
    """
    quiet_libraries()
    train, held_out = read_data(recipe)
    spec, config = recipe.base, None
    if (tiny := spec.build) is not None:
        tokenizer = train_tokenizer(corpus(train), tiny.vocabulary)
        shape = tiny.architecture, tiny.hidden_size, tiny.layers, tiny.heads, tiny.max_length
        config = tiny_config(tokenizer, *shape)
    elif spec.config is not None:
        config = AutoConfig.for_model(**spec.config)
        tokenizer = numbered_tokens(config.get_text_config().vocab_size)
    else:
        assert spec.model is not None
        config = load_config(spec.model, spec.trust_remote_code, generates=generates(recipe))
        tokenizer = load_tokenizer(spec.model, spec.trust_remote_code)
    sizes = {stage: _rows(recipe, stage, tokenizer, train, held_out) for stage in recipe.stages}
    return Subject(config, tokenizer, longest(train, recipe, STEPS), longest(held_out, recipe, STEPS), sizes)


def _rows(
    recipe: Recipe, stage: StageName, tokenizer: PreTrainedTokenizerBase, train: Records, held_out: Records
) -> Rows:
    """How many a stage has, and their lengths without the chat's marks."""
    texts = sorted(_texts(recipe, stage, train), key=len)
    spaced, last = texts[:: max(1, len(texts) // TYPICAL)], texts[-TYPICAL:]
    usual, longest = (
        fmean(len(tokenizer.encode(text)) for text in some) if some else 1.0 for some in (spaced, last)
    )
    return Rows(len(texts), len(_texts(recipe, stage, held_out)), max(longest, 1.0), max(usual, 1.0))


def _texts(recipe: Recipe, stage: StageName, records: Records) -> list[str]:
    turns: list[Sequence[Turn]]
    if stage == "sft":
        turns = [(*one.context, *one.answer) for one in records.demonstrations]
    elif stage == "rl":
        turns = [one.context for one in records.prompts]
    else:
        loss = recipe.reward.loss if recipe.reward is not None else "thumbs"
        rated = [(*one.context, one.answer) for one in records.ratings if loss != "pairs"]
        compared = [(*one.context, one.better, one.worse) for one in records.comparisons if loss != "thumbs"]
        turns = [*rated, *compared]
    return [" ".join(turn.text for turn in one) for one in turns]


@contextlib.contextmanager
def fake_session(recipe: Recipe, subject: Subject, depth: int) -> Iterator[TrialSession]:
    """A session to try a stage in on fake weights, with a base of so many layers."""
    config = backbone_of(subject.config).with_depth(depth)
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
    seed_everything(recipe.seed)
    with tempfile.TemporaryDirectory() as scratch, silence(), unknown_values():
        folder, device, trial = RunFolder(Path(scratch)), torch.device("cpu"), Trial(STEPS, abridged=True)
        yield TrialSession(recipe, folder, subject.train, subject.held_out, base, roles, device, trial=trial)
