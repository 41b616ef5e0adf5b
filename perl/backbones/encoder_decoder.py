"""Encoder-decoders such as T5 and BART: the encoder reads the context, and the decoder writes the completion.

A row is one sequence all the same: the context, then `START`, which stands for the decoder's start token, then the
completion. What is before `START` the encoder reads, the rest the decoder. So all that works on rows (masks,
lengths, log-probs, the score at the last token) is the decoders' own.

Rows that have the same context in a batch share one pass of the encoder, in training too.

Letters beside those of `perl.roles`: S positions that the encoder reads.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perl.backbones.backbone import Unsupported
from perl.backbones.chat import ChatFormat, text_of
from perl.backbones.decoder import Decoder, configured_ends
from perl.backbones.tokens import Tokens
from perl.data.records import Turn
from perl.errors import UserError

START = -1
"""No token: whatever a text or a policy says, it is not taken for the place where the decoder begins."""
DECODER_DEPTH = {
    "t5": "num_decoder_layers",
    "mt5": "num_decoder_layers",
    "umt5": "num_decoder_layers",
    "bart": "decoder_layers",
}
"""The model types that are known, and where their configurations have the number of the decoder's blocks."""


class EncoderDecoder(Decoder):
    """A sequence-to-sequence model; its cache is transformers' `EncoderDecoderCache`."""

    kind = "an encoder-decoder"
    auto_class = AutoModelForSeq2SeqLM
    task_type = "SEQ_2_SEQ_LM"
    encodes_prompts = True
    tried = ((0, START, 1, 2), (0, START, 1, 3))
    unsupported: ClassVar[tuple[Unsupported, ...]] = (
        Unsupported("4bit", "4-bit weights are for causal LMs", "Set base.quantization: none."),
        Unsupported(
            "sharding", "only the blocks of causal LMs are sharded", "Launch with recipes/engines/ddp.yaml."
        ),
        Unsupported("splitting", "its decoder attends to the encoder in every block"),
    )

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Whether it says that it is one; of a subclass with a model type, those of this type."""
        if cls.model_type is not None:
            return super().matches(config)
        return bool(getattr(config, "is_encoder_decoder", False))

    def prepare(self, where: str) -> None:
        """Refuse a model type that is not known, and a configuration without a start token."""
        if self.config.model_type not in DECODER_DEPTH:
            what = f"an encoder-decoder of type {self.config.model_type}, which is not known"
            raise UserError(what, where=where, remedy=f"Known are {', '.join(DECODER_DEPTH)}; or use a causal LM.")
        super().prepare(where)
        if getattr(self.config, "decoder_start_token_id", None) is None:
            remedy = "Set decoder_start_token_id in config.json; T5's is that of pad_token_id."
            raise UserError("the decoder has no start token", where=where, remedy=remedy)

    def own_logits(self, lm: PreTrainedModel, ids_BL: Tensor) -> Tensor:
        """By transformers' own forward with the encoder's and the decoder's ids."""
        first = ids_BL[0].tolist().index(START)
        logits_BNV: Tensor = lm(
            input_ids=ids_BL[:, :first], decoder_input_ids=self._begun(ids_BL[:, first:])
        ).logits
        return logits_BNV

    def chat_format(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Contexts as the tokenizer frames texts, and completions apart from them."""
        return EncoderDecoderFormat(tokenizer, configured_ends(lm, tokenizer))

    @property
    def depth(self) -> int:
        """Of the deeper of the two; an index names the block of either."""
        return max(int(self.config.num_hidden_layers), self.cache_layers)

    @property
    def cache_layers(self) -> int:
        """The decoder's blocks."""
        return int(getattr(self.config, DECODER_DEPTH[self.config.model_type]))

    def with_depth(self, depth: int) -> PreTrainedConfig:
        """Both in proportion."""
        config, decoder = copy.deepcopy(self.config), DECODER_DEPTH[self.config.model_type]
        share = depth / self.depth
        config.num_hidden_layers, of_decoder = (
            max(1, round(share * blocks)) for blocks in (config.num_hidden_layers, self.cache_layers)
        )
        setattr(config, decoder, of_decoder)
        return config

    def trunks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """The encoder and the decoder."""
        return [lm.get_encoder(), lm.get_decoder()]

    def blocks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """The encoder's, then the decoder's."""
        return [block for trunk in self.trunks(lm) for block in _block_list(trunk)]

    def hidden(
        self, lm: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, embeddings_BLD: Tensor | None = None
    ) -> Tensor:
        """Of each position where it is read: by the encoder before `START`, by the decoder from there on."""
        assert embeddings_BLD is None, "an encoder-decoder is not split"
        decoded_BL = (ids_BL == START).cumsum(1) > 0
        read_BL, written_BL = mask_BL & ~decoded_BL, mask_BL & decoded_BL
        source_BS, source_mask_BS = _to_the_left(ids_BL, read_BL)
        target_BN, target_mask_BN = _to_the_left(ids_BL, written_BL)
        encoded_BSD = self._encode(lm, source_BS, source_mask_BS)
        decoded_BND = lm.get_decoder()(
            input_ids=self._begun(target_BN),
            attention_mask=target_mask_BN.long(),
            encoder_hidden_states=encoded_BSD,
            encoder_attention_mask=source_mask_BS.long(),
            use_cache=False,
        ).last_hidden_state
        hidden_BLD = encoded_BSD.new_zeros(*ids_BL.shape, encoded_BSD.shape[2])
        hidden_BLD[_places(read_BL)] = encoded_BSD[_places(source_mask_BS)]
        hidden_BLD[_places(written_BL)] = decoded_BND[_places(target_mask_BN)]
        return hidden_BLD

    def extend(
        self, lm: PreTrainedModel, ids_BN: Tensor, mask_BL: Tensor, attention_mask: Tensor, cache: Cache
    ) -> Tensor:
        """By the decoder; where the cache is empty, after the encoder, whose pass is in the cache from then on."""
        filled, rows = cache.get_seq_length(), len(ids_BN)
        if filled == 0:
            columns = ids_BN[0].tolist().index(START)
            read_BS = mask_BL[:, :columns].bool()
            source_BS, source_mask_BS = _to_the_left(ids_BN[:, :columns], read_BS)
            encoded_BSD = self._encode(lm, source_BS, source_mask_BS)
            # The cache has prompts where the batch has them: padded on the left.
            states_BSD = encoded_BSD.new_zeros(rows, columns, encoded_BSD.shape[2])
            states_BSD[_places(read_BS)] = encoded_BSD[_places(source_mask_BS)]
            ids_BN = self._begun(ids_BN[:, columns:])
        else:
            columns = mask_BL.shape[1] - filled - ids_BN.shape[1]
            states_BSD = lm.get_input_embeddings().weight.new_zeros(1).expand(rows, columns, 1)  # only its length
        hidden_BND: Tensor = lm.get_decoder()(
            input_ids=ids_BN,
            attention_mask=attention_mask,
            encoder_hidden_states=states_BSD,
            encoder_attention_mask=mask_BL[:, :columns],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_BND

    def _encode(self, lm: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """The encoder's hidden states (B, S, D); equal rows are computed once."""
        ids_GS, place_B = torch.unique(ids_BS.masked_fill(~mask_BS, START), dim=0, return_inverse=True)
        mask_GS = ids_GS != START
        encoded_GSD: Tensor = lm.get_encoder()(
            input_ids=ids_GS.clamp(min=0), attention_mask=mask_GS.long()
        ).last_hidden_state
        return encoded_GSD[place_B]

    def _begun(self, ids_BN: Tensor) -> Tensor:
        """The decoder's tokens, the start token in its place."""
        return ids_BN.masked_fill(ids_BN == START, int(self.config.decoder_start_token_id))

    def head_modules(self, lm: PreTrainedModel) -> list[str]:
        """None: transformers' classifiers of these architectures read the same text with both parts."""
        return []

    def classifier(
        self, lm: PreTrainedModel, head: nn.Module, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """There is none."""
        raise UserError(
            f"transformers has no classifier of {type(lm).__name__} that reads contexts with the encoder and "
            "completions with the decoder",
            where=lm.name_or_path,
            remedy="Under LoRA export the adapter, without --merge: its README.md says how it scores.",
        )


def _block_list(trunk: Any) -> nn.ModuleList:
    """The blocks of an encoder or a decoder: T5 calls them `block`, BART `layers`."""
    blocks: nn.ModuleList = trunk.block if hasattr(trunk, "block") else trunk.layers
    return blocks


def _to_the_left(ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens under the mask, padded on the right with 0, and their mask; positions count from the left."""
    order_BN = (~mask_BL).long().argsort(dim=1, stable=True)[:, : int(mask_BL.sum(1).max())]
    mask_BN = mask_BL.gather(1, order_BN)
    return ids_BL.gather(1, order_BN).masked_fill(~mask_BN, 0), mask_BN


def _places(mask_BL: Tensor) -> tuple[Tensor, ...]:
    """Where a mask is true: as numbers, since fake tensors take no mask."""
    return mask_BL.nonzero(as_tuple=True)


class EncoderDecoderFormat(ChatFormat):
    """How dialogues are written for an encoder-decoder: a context and a completion, tokenized apart.

    A context is framed as the tokenizer frames every text (T5: an end token after it; BART: a token on either
    side). What it puts before a text the decoder is given before the completion too, as in these models' training.

    Attributes:
        first_ids: what the decoder is given after its start token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more_ends: Iterable[int] = ()) -> None:
        super().__init__(tokenizer, more_ends)
        plain, framed = self._tokens.ids("a"), list(tokenizer("a")["input_ids"])
        at = next(place for place in range(len(framed)) if framed[place : place + len(plain)] == plain)
        self.first_ids = tuple(framed[:at])
        self._last_ids = tuple(framed[at + len(plain) :])
        self._around = 2 * len(self.first_ids) + len(self._last_ids) + 1

    def context(self, turns: Sequence[Turn], length: int | None = None) -> list[int]:
        """The encoder's tokens, `START`, and what the decoder is given; at least one of the text's."""
        room = None if length is None else max(1, length - self._around)
        if turns[-1].speaker == "text":
            ids = self._tokens.ids(text_of(turns))
            return self._framed(ids if room is None else ids[-room:])
        return self._framed(super().context(turns, room))

    def _framed(self, ids: Sequence[int]) -> list[int]:
        return [*self.first_ids, *ids, *self._last_ids, START, *self.first_ids]

    def row(self, context: Sequence[Turn], completion: Turn, length: int | None = None) -> Tokens:
        """As for a decoder."""
        room = None if length is None else max(1, length - self._around - 1)
        written, ids = self._written(context, completion)
        kept = ids if room is None else ids[-room:]
        row = self._joined(context, written, kept, length)
        return row if len(kept) == len(ids) else Tokens(row.ids, row.spoken, cut=True)

    def rows(self, context: Sequence[Turn], completion: Sequence[Turn], length: int | None = None) -> list[Tokens]:
        """A row for each of the agent's turns, with all turns before it as its context."""
        turns = [*context, *completion]
        rows = []
        for index in range(len(context), len(turns)):
            if turns[index].speaker in ("agent", "text"):
                written, ids = self._written(turns[:index], turns[index])
                rows.append(self._joined(turns[:index], written, ids, length).first(length))
        return rows

    def _written(self, context: Sequence[Turn], completion: Turn) -> tuple[str, list[int]]:
        """What the template writes before a completion, and the completion's tokens."""
        if completion.speaker == "text":
            return "", [*self._tokens.ids(completion.text.strip()), self.eos_id]
        prompt, text = self.template.row([*context, completion])
        return prompt, self._tokens.ids(text.lstrip())

    def _joined(self, context: Sequence[Turn], written: str, completion: list[int], length: int | None) -> Tokens:
        room = None if length is None else length - len(completion)
        whole = self.context(context) if context else self._framed(self._tokens.ids(written))
        prompt = self.context(context, room) if context else whole
        row = Tokens.joined(prompt, completion)
        return Tokens(row.ids, row.spoken, cut=len(prompt) < len(whole))

    def probe(self, speakers: Iterable[Any]) -> list[str]:
        """Refuse a template that leaves a speaker out; no server's tokens are there to be compared."""
        self.template.check_written(self.probe_turns(set(speakers))[:-1])
        return []
