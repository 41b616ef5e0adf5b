"""The interface of a kind of model: everything in roles and stages that depends on the kind.

A backbone belongs to a configuration. Its methods take the model as an argument, since full tuning has several,
and compute as the role that is active in it. Axis letters: `perl.roles`.
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
    """A use that a kind of model does not support, with the reason and a remedy."""

    use: Use
    reason: str
    remedy: str = ""


class Backbone(ABC):
    """One kind of model.

    Attributes:
        kind: its name in messages, with the article.
        rate_factor: factor on a decoder's learning rate for learning rates that are `auto`.
        model_type: the model type of its configurations, if there is only one.
        auto_class: transformers' auto class that creates such a model or loads its weights.
        task_type: peft's task type for adapters on its language models.
        encodes_prompts: whether an encoder reads the prompts, and a decoder only the completions.
        tried: two rows that differ in the last token, on which a loaded model is tested.
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

    # Recognition and construction

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Return whether models of this configuration are of this kind."""
        return bool(config.model_type == cls.model_type)

    def refusal(self, use: Use, where: str) -> UserError | None:
        """Return the error for a use, requested by `where`, that the kind does not support; None if it does."""
        entry = next((one for one in self.unsupported if one.use == use), None)
        if entry is None:
            return None
        name = ", ".join(self.config.architectures or []) or self.config.model_type
        return UserError(f"{name} is {self.kind}: {entry.reason}", where=where, remedy=entry.remedy)

    def require(self, use: Use, where: str) -> None:
        """Raise the error that `refusal` returns, if any."""
        if (refused := self.refusal(use, where)) is not None:
            raise refused

    @abstractmethod
    def prepare(self, where: str) -> None:
        """Complete the configuration before a model is created from it.

        Raises:
            UserError: it turns out not to belong to a model of this kind.
        """

    def new_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Create a model of this configuration, with random weights from torch's global generator."""
        model = self.auto_class.from_config(self.config, dtype=dtype, trust_remote_code=has_own_code(self.config))
        assert isinstance(model, PreTrainedModel)
        return model

    @abstractmethod
    def check(self, lm: PreTrainedModel, where: str) -> None:
        """Test a loaded model on a few tokens.

        Raises:
            UserError: it computes in an unsupported way, so that all results would be wrong.
        """

    # Inputs

    @abstractmethod
    def chat_format(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Return the format of prompts and rows for this model."""

    def context_length(self, lm: PreTrainedModel) -> int:
        """Return the length of the longest supported sequence, in tokens."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 2**31))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.config.get_text_config().num_hidden_layers)

    def with_depth(self, depth: int) -> PreTrainedConfig:
        """Return a copy of the configuration with this number of blocks."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = depth
        if vars(text).get("layer_types"):  # some configurations compute it
            text.layer_types = text.layer_types[:depth]
        return config

    # Outputs

    def trunks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """Return the modules that all tokens pass through, called with `input_ids` and `attention_mask`."""
        return [lm.base_model]

    def text_model(self, lm: PreTrainedModel) -> nn.Module:
        """Return the part of the model with the blocks; a model that also reads images has other parts."""
        model: nn.Module = getattr(lm.base_model, "language_model", lm.base_model)
        return model

    @property
    def cache_layers(self) -> int:
        """Number of layers of the KV cache."""
        return self.depth

    def block_list(self, lm: PreTrainedModel) -> tuple[nn.Module, str]:
        """Return the module inside the trunk that holds the list of blocks, and the list's name in it.

        Raises:
            UserError: no list has as many modules as the configuration has layers.
        """
        count, model = self.depth, self.text_model(lm)
        for name, part in model.named_modules():
            if isinstance(part, nn.ModuleList) and len(part) == count:
                above, _, own = name.rpartition(".")
                return model.get_submodule(above), own
        remedy = "Set checkpoint_activations: false, and launch with recipes/engines/ddp.yaml."
        raise UserError(f"{type(lm).__name__} has no list of {count} blocks", where=lm.name_or_path, remedy=remedy)

    def blocks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """Return the blocks, the lowest first. Raises `UserError` as `block_list` does."""
        holder, name = self.block_list(lm)
        return list(getattr(holder, name))

    @contextlib.contextmanager
    def only(self, lm: PreTrainedModel, chosen: slice) -> Iterator[None]:
        """Restrict the trunk (in an encoder-decoder: the encoder) to these blocks inside the context."""
        holder, name = self.block_list(lm)
        blocks = getattr(holder, name)
        setattr(holder, name, blocks[chosen])
        try:
            yield
        finally:
            setattr(holder, name, blocks)

    @contextlib.contextmanager
    def watched(self, lm: PreTrainedModel, count: int) -> Iterator[list[Tensor]]:
        """Yield a list with the first `count` blocks' output in the last forward; it stays empty for 0."""
        outputs: list[Tensor] = []

        def note(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[:] = [output[0] if isinstance(output, tuple) else output]

        with self.blocks(lm)[count - 1].register_forward_hook(note) if count else contextlib.nullcontext():
            yield outputs

    def lower(self, lm: PreTrainedModel, count: int, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return hidden states (B, L, D) after the first `count` blocks, for `embeddings_BLD` of `hidden`."""
        with self.watched(lm, count) as seen, self.only(lm, slice(count)):
            self.hidden(lm, ids_BL, mask_BL)
        return seen[0]

    def hidden(
        self, lm: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, embeddings_BLD: Tensor | None = None
    ) -> Tensor:
        """Return hidden states (B, L, D) after the last norm.

        Args:
            ids_BL: token ids, int64, padded on any side.
            mask_BL: True for real tokens, bool.
            embeddings_BLD: the first block's input; None: the tokens' embeddings.
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
        """Return hidden states (B, T, D) that predict the completions' tokens; other arguments as in `hidden`.

        Args:
            completion_length: T; the rightmost T columns hold the completions, padded on their right.
        """
        self._not_read()

    def extend(
        self, lm: PreTrainedModel, ids_BN: Tensor, mask_BL: Tensor, attention_mask: Tensor, cache: Cache
    ) -> Tensor:
        """Return hidden states (B, N, D) of the N newest positions of a batch during generation.

        Args:
            ids_BN: token ids of these positions.
            mask_BL: True or 1 for real tokens, for all positions so far.
            attention_mask: the mask for attention with this cache.
            cache: of all previous positions; this method adds the new ones.
        """
        self._not_read()

    def _not_read(self) -> NoReturn:
        raise AssertionError(f"{self.kind} only scores whole rows")

    # Scores

    @abstractmethod
    def head_modules(self, lm: PreTrainedModel) -> list[str]:
        """Return the names of the head's modules in transformers' sequence classifier of this architecture."""

    def in_head(self, lm: PreTrainedModel, name: str) -> bool:
        """Return whether a weight of this name belongs to the classifier's head."""
        return name.startswith(tuple(f"{part}." for part in self.head_modules(lm)))

    @abstractmethod
    def new_head(self, lm: PreTrainedModel) -> nn.Module:
        """Create a head for a role, in fp32, with its own parameters; it scores 0."""

    @abstractmethod
    def head_parameters(self, head: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a head, by their names in transformers' sequence classifier."""

    @abstractmethod
    def score(
        self,
        lm: PreTrainedModel,
        head: nn.Module,
        ids_BL: Tensor,
        mask_BL: Tensor,
        embeddings_BLD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the head's scores (B), fp32, and the hidden states (B, L, D) of a language model.

        Other arguments are as in `hidden`.
        """

    @abstractmethod
    def classifier(
        self, lm: PreTrainedModel, head: nn.Module, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Create transformers' sequence classifier from the trunk of `lm` itself and a copy of the head.

        Args:
            config: the classifier's configuration.
            tokenizer: the classifier's tokenizer; it may have a padding token that the model lacks.

        Raises:
            UserError: transformers has no such classifier.
        """


def has_own_code(config: Any) -> bool:
    """Return whether a configuration names Python code that comes with the model and is trusted."""
    return hasattr(config, "auto_map")
