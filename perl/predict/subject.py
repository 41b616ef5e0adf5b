"""The inputs of predictions: the longest rows of the data, a tokenizer, and a base with fake weights."""

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from perl.data.pairs import to_compare
from perl.data.records import Demonstration, Records, Turn
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
"""Steps per trial: the first creates gradients and optimizer state; in the second they exist from the start."""
DEPTHS = ((2, 4), (4, 8), (8, 16))
"""Pairs of numbers of layers at which a deeper base can be run."""
TOLERANCE = 0.01
"""Share by which the weights on the line through two depths may differ from the base's."""
TYPICAL = 64
"""Number of rows from which the typical length is determined."""


@dataclass(frozen=True)
class Rows:
    """Number and lengths of a stage's rows."""

    train: int
    held_out: int
    longest: float
    """Mean tokens of the rows in a trial, before truncation."""
    usual: float
    """Mean tokens of all rows."""


@dataclass(frozen=True)
class Subject:
    """The common inputs of all predictions for one recipe and its variations."""

    config: Any
    """transformers' configuration of the base."""
    tokenizer: PreTrainedTokenizerBase
    train: Records
    held_out: Records
    """The longest rows of each kind, as in `train`."""
    sizes: dict[StageName, Rows]

    @property
    def depth(self) -> int:
        return backbone_of(self.config).depth

    @cached_property
    def depths(self) -> tuple[int, int] | None:
        """The first of `DEPTHS` whose weights lie on a line with the base's; None if the base is run as it is.

        Not all layers are alike in every base: DeepSeek-V3's first three have no experts, and every fourth of
        Qwen3-Next has another kind of attention.
        """
        for low, high in (pair for pair in DEPTHS if pair[1] < self.depth):
            first, last, whole = (_weights(self.config, depth) for depth in (low, high, self.depth))
            on_line = first + (last - first) * (self.depth - low) / (high - low)
            if math.isclose(on_line, whole, rel_tol=TOLERANCE):
                return low, high
        return None


def _weights(config: Any, depth: int) -> int:
    lm = fake_lm(backbone_of(config).with_depth(depth), torch.bfloat16)
    return sum(parameter.numel() for parameter in lm.parameters())


def read_subject(recipe: Recipe) -> Subject:
    """Read a recipe's data, tokenizer and base configuration.

    Raises:
        UserError: one of them cannot be used.
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
    apart = recipe.sft is not None and _are_apart(config, tokenizer, train.demonstrations)
    sizes = {stage: _rows(recipe, stage, tokenizer, train, held_out, apart) for stage in recipe.stages}
    return Subject(config, tokenizer, longest(train, recipe, STEPS), longest(held_out, recipe, STEPS), sizes)


def _are_apart(config: Any, tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration]) -> bool:
    """Return whether each of the agent's turns in a demonstration is a row of its own."""
    several = (one for one in demonstrations if sum(turn.speaker == "agent" for turn in one.answer) > 1)
    if (one := next(several, None)) is None:
        return False
    backbone = backbone_of(config)
    chat = backbone.chat_format(fake_lm(backbone.with_depth(1), torch.bfloat16), tokenizer)
    return len(chat.rows(one.context, one.answer)) > 1


def _rows(
    recipe: Recipe,
    stage: StageName,
    tokenizer: PreTrainedTokenizerBase,
    train: Records,
    held_out: Records,
    apart: bool,
) -> Rows:
    """Return the number of a stage's rows, and their lengths without the chat format's tokens."""
    texts = sorted(_texts(recipe, stage, train, apart), key=len)
    spaced, last = texts[:: max(1, len(texts) // TYPICAL)], texts[-TYPICAL:]
    usual, longest = (
        fmean(len(tokenizer.encode(text)) for text in some) if some else 1.0 for some in (spaced, last)
    )
    return Rows(len(texts), len(_texts(recipe, stage, held_out, apart)), max(longest, 1.0), max(usual, 1.0))


def _texts(recipe: Recipe, stage: StageName, records: Records, apart: bool) -> list[str]:
    """Return the text of each training example; of a pair, that of the longer answer."""
    turns: list[Sequence[Turn]] = []
    if stage == "sft":
        for one in records.demonstrations:
            ends = [end for end, turn in enumerate(one.answer, 1) if turn.speaker in ("agent", "text")]
            turns += [(*one.context, *one.answer[:end]) for end in (ends if apart else ends[-1:])]
    elif stage == "rl":
        turns += [one.context for one in records.prompts]
    elif recipe.reward is not None:
        loss = recipe.reward.loss
        turns += [(*rated.context, rated.answer) for rated in records.ratings if loss != "pairs"]
        for pair in to_compare(records, loss):
            answers = sorted((pair.better, pair.worse), key=lambda answer: len(answer.text))
            turns += [(*pair.context, answer) for answer in (answers if loss == "thumbs" else answers[1:])]
    return [" ".join(turn.text for turn in one) for one in turns]


@contextlib.contextmanager
def fake_session(recipe: Recipe, subject: Subject, depth: int) -> Iterator[TrialSession]:
    """Open a session for the trial of a stage on fake weights, with a base of `depth` layers."""
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
