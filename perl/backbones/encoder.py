"""Encoders as bases of reward models: BERT and its like, which read a whole row at once, in both directions.

An encoder cannot write, so the only role on it is the reward. It is read as transformers' own sequence classifier
of its architecture reads it, whatever that puts on top (BERT: the first token's state, through a pooler), so that
what is exported scores alike wherever it is loaded. That top is the head: a copy for the role, fp32, all trained.

Rows have the layout of their tokenizer, [CLS] … [SEP]: the turns stand between, each with the name of its speaker,
and each of the agent's ends with a [SEP]. Token types are all 0, as for one text.

Axis letters: B rows, L positions.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perl.backbones.chat import ChatFormat
from perl.backbones.tokens import Tokens
from perl.data.records import Turn
from perl.errors import UserError

WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of architectures end that write texts."""


def is_encoder(config: Any) -> bool:
    """Whether a model of this configuration reads texts in both directions, and cannot write any."""
    both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    writes = any(name.endswith(WRITES) for name in config.architectures or [])
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return both_ways and type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not (writes or decodes)


def head_parts(lm: PreTrainedModel) -> list[str]:
    """Names of the modules of a sequence classifier that make a score of what its blocks say."""
    outside = [
        name
        for name, part in lm.named_children()
        if part is not lm.base_model and next(part.parameters(), None) is not None
    ]
    pooled = isinstance(getattr(lm.base_model, "pooler", None), nn.Module)
    return [*([f"{lm.base_model_prefix}.pooler"] if pooled else []), *outside]


def in_head(lm: PreTrainedModel, name: str) -> bool:
    """Whether a weight of this name belongs to the classifier's head."""
    return name.startswith(tuple(f"{part}." for part in head_parts(lm)))


def position_room(lm: PreTrainedModel) -> int:
    """The longest row of an encoder, in tokens. RoBERTa and its like leave their first positions unused."""
    table = getattr(getattr(lm.base_model, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return int(getattr(lm.config, "max_position_embeddings", 2**31))
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


class EncoderHead(nn.Module):
    """The head of a role: the parts of a classifier that are not its blocks. A new one scores 0.

    Args:
        lm: a sequence classifier with one label; its own parts stay as they are.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self._names = head_parts(lm)
        self.parts = nn.ModuleList(_copied(lm.get_submodule(name)) for name in self._names)
        for part in self.parts:
            part.register_forward_pre_hook(_in_fp32)
            for layer in part.modules():
                if isinstance(layer, nn.Linear) and layer.out_features == lm.config.num_labels:
                    for parameter in layer.parameters():
                        nn.init.zeros_(parameter)

    def weights(self) -> dict[str, nn.Parameter]:
        """Its parameters, by the names that they have in the classifier."""
        return {
            f"{name}.{inner}": parameter
            for name, part in zip(self._names, self.parts, strict=True)
            for inner, parameter in part.named_parameters()
        }

    def scores(self, lm: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The score of each row (B), fp32.

        Args:
            lm: the classifier whose blocks read the rows.
            ids_BL: token ids, padded on any side.
            mask_BL: True for real tokens, bool.
        """
        # Padding goes to the right: the first token is read, and positions count from it.
        order_BL = (~mask_BL).long().argsort(dim=1, stable=True)[:, : position_room(lm)]
        mask_BL = mask_BL.gather(1, order_BL)
        with self._on(lm):
            logits_B1: Tensor = lm(input_ids=ids_BL.gather(1, order_BL), attention_mask=mask_BL.long()).logits
        return logits_B1[:, 0].float()

    @torch.no_grad()
    def put_into(self, lm: PreTrainedModel) -> None:
        """Write its weights over those of a classifier's own head."""
        for name, parameter in self.weights().items():
            lm.get_parameter(name).copy_(parameter)

    @contextlib.contextmanager
    def _on(self, lm: PreTrainedModel) -> Iterator[None]:
        """Inside, the classifier has these parts in the place of its own."""
        own = [lm.get_submodule(name) for name in self._names]
        self._place(lm, list(self.parts))
        try:
            yield
        finally:
            self._place(lm, own)

    def _place(self, lm: PreTrainedModel, parts: Sequence[nn.Module]) -> None:
        for name, part in zip(self._names, parts, strict=True):
            above, _, last = name.rpartition(".")
            setattr(lm.get_submodule(above), last, part)


def _copied(part: nn.Module) -> nn.Module:
    """A copy with parameters of its own, fp32. They are copied one by one: `deepcopy` cannot copy fake tensors."""
    fresh = {id(p): nn.Parameter(p.detach().float().clone(), requires_grad=False) for p in part.parameters()}
    return copy.deepcopy(part, memo=dict[int, Any](fresh))


def _in_fp32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, Tensor) else one for one in inputs)


class EncoderFormat(ChatFormat):
    """How an encoder's tokenizer writes dialogues: between its first and its last token, in the plain template.

    Args:
        tokenizer: its beginning and end of text become [CLS] and [SEP], its chat template the plain one.
        room: the longest row that the encoder takes, in tokens.

    Raises:
        UserError: the tokenizer has no first or no last token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        first = tokenizer.cls_token or tokenizer.bos_token
        last = tokenizer.sep_token or tokenizer.eos_token
        for token, name in ((first, "cls_token"), (last, "sep_token")):
            if token is None:
                raise UserError(
                    f"the tokenizer has no {name}: an encoder's rows are [CLS] … [SEP]",
                    where=tokenizer.name_or_path,
                    remedy=f"Set {name} in tokenizer_config.json.",
                )
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = first, last, None
        super().__init__(tokenizer)
        self._room = room

    def row(self, context: Sequence[Turn], answer: Turn, length: int | None = None) -> Tokens:
        """As for a decoder, but the whole answer stays, after the first token: a row may be longer for it.

        Raises:
            UserError: the answer is longer than the encoder takes.
        """
        tokens = super().row(context, answer)
        least = 1 + sum(tokens.spoken)
        if least > self._room:
            raise UserError(
                f"an answer has {least - 1} tokens, and with its first token a row may have {self._room}",
                where=f"the answer {answer.text[:60]!r}",
                remedy="Shorten it, or use a base that takes longer texts.",
            )
        return tokens if length is None else super().row(context, answer, max(length, least))
