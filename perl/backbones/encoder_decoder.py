"""Encoder-decoders such as T5 and BART: the encoder reads the context, and the decoder generates the completion.

A row is still one sequence: the context, then `START`, which stands for the decoder's start token, then the
completion. The encoder reads the part before `START`, the decoder the rest. So everything that works on rows
(masks, lengths, log-probs, the score at the last token) is the same as for decoders.

Rows of a batch with the same context share one pass of the encoder, in training too.

Letters in addition to those of `perl.roles`: S encoder positions, G distinct encoder rows.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForSeq2SeqLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perl.backbones.backbone import Unsupported
from perl.backbones.chat import ChatFormat
from perl.backbones.decoder import Decoder, configured_ends
from perl.backbones.encoder_decoder_format import START, EncoderDecoderFormat
from perl.errors import UserError
from perl.private.transformers import cache_argument

DECODER_DEPTH = {
    "t5": "num_decoder_layers",
    "mt5": "num_decoder_layers",
    "umt5": "num_decoder_layers",
    "bart": "decoder_layers",
}
"""The supported model types, with the configuration key of the number of decoder blocks."""


class EncoderDecoder(Decoder):
    """A sequence-to-sequence model; its cache is transformers' `EncoderDecoderCache`."""

    kind = "an encoder-decoder"
    auto_class = AutoModelForSeq2SeqLM
    configs = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    task_type = "SEQ_2_SEQ_LM"
    encodes_prompts = True
    tried = ((0, START, 1, 2), (0, START, 1, 3))
    unsupported: ClassVar[tuple[Unsupported, ...]] = (
        Unsupported("4bit", "4-bit weights are for causal LMs", "Set base.quantization: none."),
        Unsupported(
            "sharding", "only the blocks of causal LMs are sharded", "Launch with recipes/engines/ddp.yaml."
        ),
    )

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Return whether the configuration says so; a subclass with a model type matches only this type."""
        if cls.model_type is not None:
            return super().matches(config)
        return bool(getattr(config, "is_encoder_decoder", False))

    def prepare(self, where: str) -> None:
        """Refuse unsupported model types, and configurations without a start token."""
        if self.config.model_type not in DECODER_DEPTH:
            what = f"an encoder-decoder of the unsupported type {self.config.model_type}"
            raise UserError(what, where=where, remedy=f"Use one of {', '.join(DECODER_DEPTH)}, or a causal LM.")
        super().prepare(where)
        if getattr(self.config, "decoder_start_token_id", None) is None:
            remedy = "Set decoder_start_token_id in config.json; T5's equals pad_token_id."
            raise UserError("the decoder has no start token", where=where, remedy=remedy)

    def own_logits(self, lm: PreTrainedModel, ids_BL: Tensor) -> Tensor:
        """Compute them with transformers' own forward, from the encoder's and the decoder's ids."""
        first = ids_BL[0].tolist().index(START)
        logits_BNV: Tensor = lm(
            input_ids=ids_BL[:, :first], decoder_input_ids=self._with_start_token(ids_BL[:, first:])
        ).logits
        return logits_BNV

    def chat_format(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Return the format of contexts, framed by the tokenizer, and separate completions."""
        return EncoderDecoderFormat(tokenizer, configured_ends(lm, tokenizer))

    @property
    def depth(self) -> int:
        """Number of blocks of the deeper of the two; an index refers to the block in both."""
        return max(int(self.config.num_hidden_layers), self.cache_layers)

    @property
    def cache_layers(self) -> int:
        """Number of decoder blocks."""
        return int(getattr(self.config, DECODER_DEPTH[self.config.model_type]))

    def with_depth(self, depth: int) -> PreTrainedConfig:
        """Return a copy of the configuration in which both are scaled in proportion."""
        config, decoder = copy.deepcopy(self.config), DECODER_DEPTH[self.config.model_type]
        share = depth / self.depth
        config.num_hidden_layers, of_decoder = (
            max(1, round(share * blocks)) for blocks in (config.num_hidden_layers, self.cache_layers)
        )
        setattr(config, decoder, of_decoder)
        return config

    def trunks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """Return the encoder and the decoder."""
        return [lm.get_encoder(), lm.get_decoder()]

    def block_list(self, lm: PreTrainedModel) -> tuple[nn.Module, str]:
        """Return the encoder's list: decoder blocks attend to the encoder, so roles share none of them."""
        return lm.get_encoder(), _list_name(lm.get_encoder())

    def blocks(self, lm: PreTrainedModel) -> list[nn.Module]:
        """Return the encoder's blocks, then the decoder's."""
        return [block for trunk in self.trunks(lm) for block in getattr(trunk, _list_name(trunk))]

    @contextlib.contextmanager
    def only(self, lm: PreTrainedModel, chosen: slice) -> Iterator[None]:
        """Restrict the encoder's blocks; T5's first block holds the relative position bias for all of them."""
        lowest = self.blocks(lm)[0]
        with super().only(lm, chosen), _position_bias_of(lowest, self.blocks(lm)[0]):
            yield

    def lower(self, lm: PreTrainedModel, count: int, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the lower hidden states at the encoder's positions, and 0 elsewhere."""
        read_BL = mask_BL & ~_decoded(ids_BL)
        source_BS, source_mask_BS = _compacted(ids_BL, read_BL)
        ids_GS, place_B = _distinct(source_BS, source_mask_BS)
        with self.watched(lm, count) as seen, self.only(lm, slice(count)):
            _run_encoder(lm, ids_GS)
        lower_BSD = seen[0][place_B]
        lower_BLD = lower_BSD.new_zeros(*ids_BL.shape, lower_BSD.shape[2])
        lower_BLD[_indices(read_BL)] = lower_BSD[_indices(source_mask_BS)]
        return lower_BLD

    def hidden(
        self, lm: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, embeddings_BLD: Tensor | None = None
    ) -> Tensor:
        """Return the encoder's hidden states before `START`, and the decoder's from there on."""
        decoded_BL = _decoded(ids_BL)
        read_BL, written_BL = mask_BL & ~decoded_BL, mask_BL & decoded_BL
        source_BS, source_mask_BS = _compacted(ids_BL, read_BL)
        target_BN, target_mask_BN = _compacted(ids_BL, written_BL)
        lower_BSD = None
        if embeddings_BLD is not None:
            lower_BSD = embeddings_BLD.new_zeros(*source_BS.shape, embeddings_BLD.shape[2])
            lower_BSD[_indices(source_mask_BS)] = embeddings_BLD[_indices(read_BL)]
        encoded_BSD = self._encode(lm, source_BS, source_mask_BS, lower_BSD)
        decoded_BND = lm.get_decoder()(
            input_ids=self._with_start_token(target_BN),
            attention_mask=target_mask_BN.long(),
            encoder_hidden_states=encoded_BSD,
            encoder_attention_mask=source_mask_BS.long(),
            use_cache=False,
        ).last_hidden_state
        hidden_BLD = encoded_BSD.new_zeros(*ids_BL.shape, encoded_BSD.shape[2])
        hidden_BLD[_indices(read_BL)] = encoded_BSD[_indices(source_mask_BS)]
        hidden_BLD[_indices(written_BL)] = decoded_BND[_indices(target_mask_BN)]
        return hidden_BLD

    def extend(
        self, lm: PreTrainedModel, ids_BN: Tensor, mask_BL: Tensor, attention_mask: Tensor, cache: Cache
    ) -> Tensor:
        """Run the decoder; if the cache is empty, run the encoder first, whose keys and values are then cached."""
        filled, rows = cache.get_seq_length(), len(ids_BN)
        if filled == 0:
            columns = ids_BN[0].tolist().index(START)
            read_BS = mask_BL[:, :columns].bool()
            source_BS, source_mask_BS = _compacted(ids_BN[:, :columns], read_BS)
            encoded_BSD = self._encode(lm, source_BS, source_mask_BS)
            # Prompts are padded on the left in the cache, as in the batch.
            states_BSD = encoded_BSD.new_zeros(rows, columns, encoded_BSD.shape[2])
            states_BSD[_indices(read_BS)] = encoded_BSD[_indices(source_mask_BS)]
            ids_BN = self._with_start_token(ids_BN[:, columns:])
        else:
            columns = mask_BL.shape[1] - filled - ids_BN.shape[1]
            states_BSD = lm.get_input_embeddings().weight.new_zeros(1).expand(rows, columns, 1)  # only its length
        hidden_BND: Tensor = lm.get_decoder()(
            input_ids=ids_BN,
            attention_mask=attention_mask,
            encoder_hidden_states=states_BSD,
            encoder_attention_mask=mask_BL[:, :columns],
            use_cache=True,
            **{cache_argument(type(lm).forward): cache},
        ).last_hidden_state
        return hidden_BND

    def _encode(
        self, lm: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor, lower_BSD: Tensor | None = None
    ) -> Tensor:
        """Return the encoder's hidden states (B, S, D), from `lower_BSD` on if given; equal rows only once."""
        ids_GS, place_B = _distinct(ids_BS, mask_BS)
        with contextlib.ExitStack() as stack:
            if lower_BSD is not None:
                first_G = place_B.new_zeros(len(ids_GS)).scatter_reduce_(
                    0, place_B, torch.arange(len(place_B), device=place_B.device), "amin", include_self=False
                )
                # A hook, as BART adds positions to `inputs_embeds`.
                given = self.blocks(lm)[0].register_forward_pre_hook(
                    lambda _, inputs: (lower_BSD[first_G], *inputs[1:])
                )
                stack.enter_context(given)
            return _run_encoder(lm, ids_GS)[place_B]

    def _with_start_token(self, ids_BN: Tensor) -> Tensor:
        """Replace `START` in the decoder's tokens with the start token."""
        return ids_BN.masked_fill(ids_BN == START, int(self.config.decoder_start_token_id))

    def head_modules(self, lm: PreTrainedModel) -> list[str]:
        """Return none: transformers' classifiers of these architectures read the same text with both parts."""
        return []

    def classifier(
        self, lm: PreTrainedModel, head: nn.Module, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Raise: there is no such classifier."""
        raise UserError(
            f"transformers has no classifier of {type(lm).__name__} that reads contexts with the encoder and "
            "completions with the decoder",
            where=lm.name_or_path,
            remedy="Under LoRA, export the adapter without --merge: its README.md says how it scores.",
        )


def _list_name(trunk: nn.Module) -> str:
    """Return the attribute with the blocks of an encoder or a decoder: T5's is `block`, BART's `layers`."""
    return "block" if hasattr(trunk, "block") else "layers"


@contextlib.contextmanager
def _position_bias_of(lowest: Any, first: Any) -> Iterator[None]:
    """Pass T5's position bias, if only its lowest block has it, to the first block that runs."""
    if not hasattr(first, "layer") or first.layer[0].SelfAttention.has_relative_attention_bias:
        yield
        return

    def lend(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        length = inputs[0].shape[1]
        return (*inputs[:2], lowest.layer[0].SelfAttention.compute_bias(length, length), *inputs[3:])

    with first.register_forward_pre_hook(lend):
        yield


def _decoded(ids_BL: Tensor) -> Tensor:
    """Return a mask of the decoder's positions."""
    return (ids_BL == START).cumsum(1) > 0


def _distinct(ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows (G, S), with `START` as padding, and each row's index among them."""
    ids_GS, place_B = torch.unique(ids_BS.masked_fill(~mask_BS, START), dim=0, return_inverse=True)
    return ids_GS, place_B


def _run_encoder(lm: PreTrainedModel, ids_GS: Tensor) -> Tensor:
    """Return the encoder's hidden states (G, S, D) of rows from `_distinct`."""
    encoded_GSD: Tensor = lm.get_encoder()(
        input_ids=ids_GS.clamp(min=0), attention_mask=(ids_GS != START).long()
    ).last_hidden_state
    return encoded_GSD


def _compacted(ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens under the mask, padded on the right with 0, and their mask."""
    order_BN = (~mask_BL).long().argsort(dim=1, stable=True)[:, : int(mask_BL.sum(1).max())]
    mask_BN = mask_BL.gather(1, order_BN)
    return ids_BL.gather(1, order_BN).masked_fill(~mask_BN, 0), mask_BN


def _indices(mask_BL: Tensor) -> tuple[Tensor, ...]:
    """Return the indices at which a mask is true, since fake tensors cannot be indexed with a mask."""
    return mask_BL.nonzero(as_tuple=True)
