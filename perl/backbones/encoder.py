"""Encoders such as BERT: they read a row bidirectionally, and can only be reward models.

The model is transformers' sequence classifier of the architecture, so that an exported model gives the same scores
wherever it is loaded. Everything above its blocks (BERT: a pooler of the first token) is the head: a copy per
role, in fp32 and fully trained.

Rows are [CLS] … [SEP], as the tokenizer frames texts: between them the turns with their speakers' names, with a
[SEP] after each of the agent's turns. Token types are all 0.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perl.backbones.backbone import Backbone, Unsupported
from perl.backbones.chat import ChatFormat
from perl.backbones.decoder import GENERATES
from perl.backbones.tokens import Tokens
from perl.data.records import Turn
from perl.errors import UserError
from perl.private.transformers import has_classifier, has_masked_lm


class Encoder(Backbone):
    """A bidirectional sequence classifier with one label."""

    kind = "an encoder"
    rate_factor = 0.5  # post-norm blocks: all-MiniLM-L6-v2 at twice this rate learned nothing in one of three runs
    auto_class = AutoModelForSequenceClassification
    unsupported = (
        Unsupported(
            "generation",
            "it reads texts bidirectionally and cannot generate any",
            "Train only a reward model on it (a recipe with only a reward section), or use a causal LM.",
        ),
        Unsupported("likelihood", "it assigns no probabilities to words", "Leave out reward.likelihood."),
        Unsupported(
            "4bit",
            "4-bit weights are for causal LMs, since an encoder's head would be rounded with the rest",
            "Set base.quantization: none; encoders are small.",
        ),
        Unsupported(
            "sharding",
            "only the blocks of causal LMs are sharded",
            "Launch with recipes/engines/ddp.yaml: encoders are small.",
        ),
        Unsupported("splitting", "it transforms its embeddings before the first block"),
    )

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Return whether the model is bidirectional, and neither architecture nor flags say that it generates."""
        if cls.model_type is not None:
            return super().matches(config)
        generates = any(name.endswith(GENERATES) for name in config.architectures or [])
        decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        return has_masked_lm(config) and has_classifier(config) and not (generates or decodes)

    def prepare(self, where: str) -> None:
        """Set the number of labels to one."""
        self.config.num_labels = 1

    def check(self, lm: PreTrainedModel, where: str) -> None:
        """Do nothing: scores come from the model's own forward."""

    def chat_format(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Return the format of turns between the tokenizer's first and last special token."""
        return EncoderFormat(tokenizer, self.context_length(lm))

    def context_length(self, lm: PreTrainedModel) -> int:
        """Return the length of the longest row, in tokens; RoBERTa's first positions are unused."""
        table = getattr(getattr(lm.base_model, "embeddings", None), "position_embeddings", None)
        if not isinstance(table, nn.Embedding):
            return super().context_length(lm)
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)

    def head_modules(self, lm: PreTrainedModel) -> list[str]:
        """Return the pooler, and all modules outside the trunk that have parameters."""
        outside = [
            name
            for name, part in lm.named_children()
            if part is not lm.base_model and next(part.parameters(), None) is not None
        ]
        pooled = isinstance(getattr(lm.base_model, "pooler", None), nn.Module)
        return [*([f"{lm.base_model_prefix}.pooler"] if pooled else []), *outside]

    def new_head(self, lm: PreTrainedModel) -> "ClassifierHead":
        """Copy the model's own head, with its last layer set to zero."""
        return ClassifierHead(lm, self.head_modules(lm))

    def head_parameters(self, head: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of all its modules."""
        assert isinstance(head, ClassifierHead)
        return head.named()

    def score(
        self,
        lm: PreTrainedModel,
        head: nn.Module,
        ids_BL: Tensor,
        mask_BL: Tensor,
        embeddings_BLD: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Score with the classifier's own forward, in which this head replaces its own."""
        assert isinstance(head, ClassifierHead)
        assert embeddings_BLD is None, "an encoder is not split"
        # Move padding to the right: the first token is read, and positions count from it.
        order_BL = (~mask_BL).long().argsort(dim=1, stable=True)[:, : self.context_length(lm)]
        mask_BL = mask_BL.gather(1, order_BL)
        with head.placed(lm):
            logits_B1: Tensor = lm(input_ids=ids_BL.gather(1, order_BL), attention_mask=mask_BL.long()).logits
        return logits_B1[:, 0].float(), None

    @torch.no_grad()
    def classifier(
        self, lm: PreTrainedModel, head: nn.Module, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Return the model itself, with its own head overwritten."""
        for name, parameter in self.head_parameters(head).items():
            lm.get_parameter(name).copy_(parameter)
        lm.config = config
        return lm


class ClassifierHead(nn.Module):
    """The parts of a classifier other than its blocks.

    Args:
        lm: a sequence classifier with one label; its own parts are not changed.
        names: the names of the parts.
    """

    def __init__(self, lm: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        self.parts = nn.ModuleList(_fp32_copy(lm.get_submodule(name)) for name in names)
        for part in self.parts:
            part.register_forward_pre_hook(_in_fp32)
            for layer in part.modules():
                if isinstance(layer, nn.Linear) and layer.out_features == lm.config.num_labels:
                    for parameter in layer.parameters():
                        nn.init.zeros_(parameter)

    def named(self) -> dict[str, nn.Parameter]:
        """Return its parameters, by their names in the classifier."""
        return {
            f"{name}.{inner}": parameter
            for name, part in zip(self._names, self.parts, strict=True)
            for inner, parameter in part.named_parameters()
        }

    @contextlib.contextmanager
    def placed(self, lm: PreTrainedModel) -> Iterator[None]:
        """Replace the classifier's own parts with these inside the context."""
        own = [lm.get_submodule(name) for name in self._names]
        self._place(lm, self.parts)
        try:
            yield
        finally:
            self._place(lm, own)

    def _place(self, lm: PreTrainedModel, parts: Sequence[nn.Module] | nn.ModuleList) -> None:
        for name, part in zip(self._names, parts, strict=True):
            above, _, last = name.rpartition(".")
            setattr(lm.get_submodule(above), last, part)


def _fp32_copy(part: nn.Module) -> nn.Module:
    """Copy a module, with new fp32 parameters copied one by one, as `deepcopy` cannot copy fake tensors."""
    fresh = {id(p): nn.Parameter(p.detach().float().clone(), requires_grad=False) for p in part.parameters()}
    return copy.deepcopy(part, memo=dict[int, Any](fresh))


def _in_fp32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, Tensor) else one for one in inputs)


class EncoderFormat(ChatFormat):
    """An encoder's format of dialogues: the plain template between the tokenizer's first and last token.

    Args:
        tokenizer: its BOS and EOS tokens become [CLS] and [SEP], its chat template the plain one.
        room: length of the encoder's longest row, in tokens.

    Raises:
        UserError: the tokenizer lacks a first or a last token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        first = tokenizer.cls_token or tokenizer.bos_token
        last = tokenizer.sep_token or tokenizer.eos_token
        for token, name in ((first, "cls_token"), (last, "sep_token")):
            if token is None:
                what, remedy = f"the tokenizer has no {name}", f"Set {name} in tokenizer_config.json."
                raise UserError(
                    f"{what}: an encoder's rows are [CLS] … [SEP]", where=tokenizer.name_or_path, remedy=remedy
                )
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = first, last, None
        super().__init__(tokenizer)
        self._room = room

    def row(self, context: Sequence[Turn], completion: Turn, length: int | None = None) -> Tokens:
        """Return the row as in a decoder, but never truncate the completion, even if the row exceeds `length`.

        Raises:
            UserError: the completion is too long for the encoder.
        """
        tokens = super().row(context, completion)
        least = 1 + sum(tokens.spoken)
        if least > self._room:
            raise UserError(
                f"a completion has {least - 1} tokens; a row may have {self._room}, including its first token",
                where=f"the completion {completion.text[:60]!r}",
                remedy="Shorten it, or use a base with a longer context.",
            )
        return tokens if length is None else super().row(context, completion, max(length, least))
