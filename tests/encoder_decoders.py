"""Tiny random encoder-decoders with their tokenizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.conftest import make_tokenizer

T5: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "init_std": 0.3,
}


def framed(special: list[str], before: str | None, after: str, **tokens: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that adds a special token after each text and, if given, one before it."""
    tokenizer = make_tokenizer(special, None, **tokens)
    around = [token for token in (before, after) if token is not None]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before or ''} $A {after}".strip(),
        special_tokens=[(token, special.index(token)) for token in around],
    )
    return tokenizer


def tiny_t5(folder: Path, **changes: Any) -> Path:
    """Write a random T5 of 35,000 weights without a chat template to a folder; `changes` replace its shape."""
    tokenizer = framed(["<pad>", "</s>", "<unk>"], None, "</s>", pad_token="<pad>", eos_token="</s>")
    return _written(folder, lambda: T5ForConditionalGeneration(T5Config(**{**T5, **changes})), tokenizer)


def tiny_bart(folder: Path, **changes: Any) -> Path:
    """Write a random BART of 70,000 weights to a folder; its tokenizer puts texts between two special tokens."""
    tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = framed(["<s>", "<pad>", "</s>"], "<s>", "</s>", **tokens)
    return _written(folder, lambda: BartForConditionalGeneration(BartConfig(**{**BART, **changes})), tokenizer)


def _written(folder: Path, make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


UNEVEN = {"t5": {"num_decoder_layers": 3}, "bart": {"encoder_layers": 3}}
"""Changes that make encoder and decoder differ in depth."""
MAKERS = {"t5": tiny_t5, "bart": tiny_bart}
