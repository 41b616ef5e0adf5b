"""The interface of a kind of model: all that depends on the kind in roles and stages.

A backbone belongs to a configuration. Its methods take the model, of which full tuning has several, and compute as
the role that is active in it. Axis letters: `perl.roles`.
"""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from perl.backbones.chat import ChatFormat
from perl.errors import UserError

Use = Literal["generation", "likelihood", "4bit", "sharding", "splitting"]


@dataclass(frozen=True)
class Unsupported:
    """A use that a kind of model is not fit for, why, and what to do instead."""

    use: Use
    reason: str
    remedy: str = ""


class Backbone(ABC):
    """One kind of model.

    Attributes:
        kind: its name in messages, with the article.
        rate_factor: of learning rates that are `auto`: how many times a decoder's suits this kind.
        model_type: of its configurations, for a kind that has one type only.
        auto_class: of transformers, which makes such a model from its configuration, and loads its weights.
        task_type: peft's, of adapters on its language models.
        encodes_prompts: whether an encoder reads the prompts, and a decoder the completions alone.
        tried: two rows that differ in the last token, on which a loaded model is tried.
    """

    kind: ClassVar[str]
    model_type: ClassVar[str | None] = None
    auto_class: ClassVar[Any]
    task_type: ClassVar[str] = "CAUSAL_LM"
    encodes_prompts: ClassVar[bool] = False
    rate_factor: ClassVar[float] = 1.0
    tried: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1, 2), (0, 1, 3))
    unsupported: ClassVar[tuple[Unsupported, ...]] = ()

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    # How it is recognised and made

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Whether models of this configuration are of this kind."""
        return bool(config.model_type == cls.model_type)

    def refusal(self, use: Use, where: str) -> UserError | None:
        """The error that says why such a model is not fit for a use that `where` asks for; None if it is fit."""
        entry = next((one for one in self.unsupported if one.use == use), None)
        if entry is None:
            return None
        name = ", ".join(self.config.architectures or []) or self.config.model_type
        return UserError(f"{name} is {self.kind}: {entry.reason}", where=where, remedy=entry.remedy)

    def require(self, use: Use, where: str) -> None:
        """Raise what `refusal` returns, if anything."""
        if (refused := self.refusal(use, where)) is not None:
            raise refused

    @abstractmethod
    def prepare(self, where: str) -> None:
        """Complete the configuration before a model is made of it.

        Raises:
            UserError: it is of no model of this kind after all.
        """

    def new_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model of this configuration, its weights drawn by torch's global generator."""
        model = self.auto_class.from_config(self.config, dtype=dtype, trust_remote_code=has_own_code(self.config))
        assert isinstance(model, PreTrainedModel)
        return model

    @abstractmethod
    def check(self, lm: PreTrainedModel, where: str) -> None:
        """Try a loaded model on a few tokens.

        Raises:
            UserError: it computes in a way that is not known here, so that all results would be wrong.
        """

    # How it is fed

    @abstractmethod
    def chat_format(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """How prompts and rows are written for it."""

    def context_length(self, lm: PreTrainedModel) -> int:
        """The longest sequence that it takes, in tokens."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 2**31))

    @property
    def depth(self) -> int:
        """How many blocks lie one on another."""
        return int(self.config.get_text_config().num_hidden_layers)

    def with_depth(self, depth: int) -> PreTrainedConfig:
        """A copy of the configuration, of a model with so many blocks."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
        return config

    # How it is read

    def trunks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """The modules that all tokens go through, called with `input_ids` and `attention_mask`."""
        return [lm.base_model]

    @property
    def cache_layers(self) -> int:
        """The layers of a cache of keys and values."""
        return self.depth

    def block_list(self, lm: PreTrainedModel) -> tuple[nn.Module, str]:
        """The module inside the trunk that holds the list of blocks, and the list's name in it.

        Raises:
            UserError: no list has as many modules as the configuration has layers.
        """
        count = self.depth
        for name, part in lm.base_model.named_modules():
            if isinstance(part, nn.ModuleList) and len(part) == count:
                above, _, own = name.rpartition(".")
                return lm.base_model.get_submodule(above), own
        remedy = "Set checkpoint_activations: false, and launch with recipes/engines/ddp.yaml."
        raise UserError(f"{type(lm).__name__} has no list of {count} blocks", where=lm.name_or_path, remedy=remedy)

    def blocks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """Its blocks, the lowest first. Raises `UserError` as `block_list` does."""
        holder, name = self.block_list(lm)
        return list(getattr(holder, name))

    @contextlib.contextmanager
    def only(self, lm: PreTrainedModel, chosen: slice) -> Iterator[None]:
        """Inside, the trunk (of an encoder-decoder: the encoder) has these blocks only."""
        holder, name = self.block_list(lm)
        blocks = getattr(holder, name)
        setattr(holder, name, blocks[chosen])
        try:
            yield
        finally:
            setattr(holder, name, blocks)

    @contextlib.contextmanager
    def watched(self, lm: PreTrainedModel, count: int) -> Iterator[list[Tensor]]:
        """Inside, the list holds the output of the first `count` blocks in the last forward; stays empty if 0."""
        outputs: list[Tensor] = []

        def note(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[:] = [output[0] if isinstance(output, tuple) else output]

        with self.blocks(lm)[count - 1].register_forward_hook(note) if count else contextlib.nullcontext():
            yield outputs

    def lower(self, lm: PreTrainedModel, count: int, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states (B, L, D) after the first `count` blocks: what `hidden` takes as `embeddings_BLD`."""
        with self.watched(lm, count) as seen, self.only(lm, slice(count)):
            self.hidden(lm, ids_BL, mask_BL)
        return seen[0]

    def hidden(
        self, lm: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, embeddings_BLD: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, L, D) after the last norm.

        Args:
            ids_BL: token ids, int64, padded on any side.
            mask_BL: True for real tokens, bool.
            embeddings_BLD: what the first block is given; None: the tokens' embeddings.
        """
        self._not_read()

    def states(
        self,
        lm: PreTrainedModel,
        ids_BL: Tensor,
        mask_BL: Tensor,
        completion_length: int,
        embeddings_BLD: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) that the tokens of the completions are predicted from; the rest as in `hidden`.

        Args:
            completion_length: T; the columns at the right end hold the completions, padded on their right.
        """
        self._not_read()

    def extend(
        self, lm: PreTrainedModel, ids_BN: Tensor, mask_BL: Tensor, attention_mask: Tensor, cache: Cache
    ) -> Tensor:
        """Hidden states (B, N, D) of the N newest positions of a batch that is generated.

        Args:
            ids_BN: their tokens.
            mask_BL: True or 1 for real tokens, of all positions so far.
            attention_mask: the mask that attention with this cache is given.
            cache: of all positions before; this method adds the new ones.
        """
        self._not_read()

    def _not_read(self) -> NoReturn:
        raise AssertionError(f"{self.kind} is read as a whole only")

    # How it scores

    @abstractmethod
    def head_modules(self, lm: PreTrainedModel) -> list[str]:
        """The modules of transformers' sequence classifier of this architecture that are its head, by name."""

    def in_head(self, lm: PreTrainedModel, name: str) -> bool:
        """Whether a weight of this name belongs to the classifier's head."""
        return name.startswith(tuple(f"{part}." for part in self.head_modules(lm)))

    @abstractmethod
    def new_head(self, lm: PreTrainedModel) -> nn.Module:
        """A head for a role, in fp32, with its own parameters; it scores 0."""

    @abstractmethod
    def head_parameters(self, head: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a head, by the names that they have in transformers' sequence classifier."""

    @abstractmethod
    def score(
        self,
        lm: PreTrainedModel,
        head: nn.Module,
        ids_BL: Tensor,
        mask_BL: Tensor,
        embeddings_BLD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The head's score of each row (B), fp32, and the hidden states (B, L, D) of a language model.

        The rest is as in `hidden`.
        """

    @abstractmethod
    def classifier(
        self, lm: PreTrainedModel, head: nn.Module, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Transformers' sequence classifier, of the trunk of `lm` itself and a copy of the head.

        Args:
            config: the classifier's.
            tokenizer: of the classifier; it may have a token for padding that the model does not know.

        Raises:
            UserError: transformers has no such classifier.
        """


def has_own_code(config: Any) -> bool:
    """Whether a configuration names Python code that comes with the model and is trusted."""
    return hasattr(config, "auto_map")
