"""The tiny base: a small Llama or T5, trained from scratch on a source's dialogues in minutes and cached.

It replaces a pretrained model if none can be downloaded. The result is an ordinary model folder.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Adafactor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from perl.backbones.chat import ChatFormat
from perl.backbones.encoder_decoder_format import START, EncoderDecoderFormat
from perl.backbones.template import MESSAGE_ROLES
from perl.data.records import Demonstration
from perl.errors import UserError, machine_fault
from perl.system.files import user_cache
from perl.system.progress import track

Architecture = Literal["llama", "t5"]
CHATS: dict[Architecture, type[ChatFormat]] = {"llama": ChatFormat, "t5": EncoderDecoderFormat}
MODELS: dict[Architecture, type[PreTrainedModel]] = {"llama": LlamaForCausalLM, "t5": T5ForConditionalGeneration}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", *(f"<|{role}|>" for role in MESSAGE_ROLES.values())]
PIECES = r"\d| ?[^\W\d_]+|[^\w\s]+(?: [^\w\s]+)*|\s+|_"
"""Pieces that BPE never merges with others: digits, so that numbers are copied; words with space; punctuation."""
INITIALIZER_RANGE = 0.08
"""With transformers' 0.02 a model this narrow takes several times longer to learn to copy words
(docs/experiments.md)."""
BUCKET = 32
"""Rows are padded to a multiple of this, to limit the number of shapes."""
RATES: dict[Architecture, float] = {"llama": 3e-3, "t5": 3e-2}
"""Default learning rates; for a T5 relative to each weight's size, see `_optimizer`."""
VERSIONS: dict[Architecture, int] = {"llama": 1, "t5": 2}
"""Must be increased when the same settings produce a different base."""


def build_base(
    corpus: Sequence[Demonstration],
    *,
    architecture: Architecture,
    hidden_size: int,
    layers: int,
    heads: int,
    vocabulary: int,
    max_length: int,
    steps: int,
    batch_tokens: int,
    learning_rate: float | None,
    seed: int,
) -> Path:
    """Train a tokenizer and a small model on the corpus; return its folder, cached by content.

    A Llama is trained on all turns, a T5 on the agent's, given the previous turns.

    Args:
        vocabulary: number of tokens of the byte-level BPE.
        steps: number of optimizer steps, of about `batch_tokens` tokens each.
        learning_rate: the peak rate; None: that of `RATES`.

    Raises:
        UserError: the cache cannot be written; raised before any training.
    """
    learning_rate = learning_rate or RATES[architecture]
    settings = {name: value for name, value in locals().items() if name != "corpus"}
    if architecture == "llama":
        del settings["architecture"]  # keeps the cache keys from before T5 was added
    digest = hashlib.sha256(json.dumps([VERSIONS[architecture], settings], sort_keys=True).encode())
    for record in corpus:
        digest.update(repr((record.context, record.answer)).encode())
    folder = user_cache() / "bases" / digest.hexdigest()[:16]
    if (folder / "model.safetensors").exists():
        return folder
    with _unfinished(folder) as unfinished:
        tokenizer = train_tokenizer(corpus, vocabulary)
        chat = CHATS[architecture](tokenizer)
        length = None if architecture == "llama" else max_length  # a Llama's rows are truncated at the end
        made = (row for record in corpus for row in chat.rows(record.context, record.answer, length))
        rows = [row.ids[:max_length] for row in made]
        config = tiny_config(tokenizer, architecture, hidden_size, layers, heads, max_length)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MODELS[architecture](config)
        pretrain(model, rows, steps, batch_tokens, learning_rate, seed)
        model.to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    architecture: Architecture,
    hidden_size: int,
    layers: int,
    heads: int,
    max_length: int,
) -> PreTrainedConfig:
    """Return the configuration of a tiny base."""
    if architecture == "t5":
        return T5Config(
            vocab_size=len(tokenizer),
            d_model=hidden_size,
            d_kv=hidden_size // heads,
            d_ff=hidden_size * 3,
            num_layers=layers,
            num_heads=heads,
            dropout_rate=0.0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_tokenizer(corpus: Sequence[Demonstration], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on all turns of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (turn.text for record in corpus for turn in (*record.context, *record.answer))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=TEMPLATE,
    )


def pretrain(
    model: PreTrainedModel,
    rows: list[list[int]],
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Minimize the next-token loss, with a cosine schedule with warmup and rows batched by length.

    Args:
        rows: token ids.
        steps: number of optimizer steps, of about `batch_tokens` tokens each.
        seed: for the order of the rows.
    """
    optimizer = _optimizer(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    batches: list[list[list[int]]] = []
    rng = random.Random(seed)
    model.train()
    with track("tiny base", steps) as bar:
        for _ in range(steps):
            if not batches:
                batches = _batches(rows, batch_tokens, rng)
            loss = _loss(model, batches.pop())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            bar(loss=loss.item())
    model.eval()


def _optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW; for a T5 Adafactor, as T5 was trained (Raffel et al. 2020, arXiv 1910.10683, section 3.1.2).

    T5's embeddings are initially ten times larger than its other weights. Adafactor's steps are relative to the
    size of each weight (Shazeer and Stern 2018, arXiv 1804.04235, section 8), AdamW's are not.
    """
    if model.config.is_encoder_decoder:
        optimizer: torch.optim.Optimizer = Adafactor(
            model.parameters(), lr=learning_rate, scale_parameter=True, relative_step=False
        )
        return optimizer
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def _loss(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """Return the mean next-token loss over all tokens, or over the decoder's tokens."""
    if not model.config.is_encoder_decoder:
        ids_BL, labels_BL = _pad(rows)
        return model(input_ids=ids_BL, labels=labels_BL).loss  # type: ignore[no-any-return]
    ids_BS, read_BS = _pad([row[: row.index(START)] for row in rows])
    _, labels_BT = _pad([row[row.index(START) + 1 :] for row in rows])
    mask_BS = (read_BS != -100).long()
    return model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BT).loss  # type: ignore[no-any-return]


def _batches(rows: list[list[int]], batch_tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Group rows of similar length into batches of about `batch_tokens` tokens, in random order."""
    buckets: dict[int, list[list[int]]] = {}
    for row in rng.sample(rows, len(rows)):
        buckets.setdefault(-(-len(row) // BUCKET), []).append(row)
    batches = []
    for bucket, members in sorted(buckets.items()):
        size = max(1, batch_tokens // (bucket * BUCKET))
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    rng.shuffle(batches)
    return batches


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids, right-padded with 0 to a multiple of `BUCKET`, and labels that ignore the padding."""
    length = -(-max(len(row) for row in rows) // BUCKET) * BUCKET
    ids_BL = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels_BL = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    return ids_BL, labels_BL


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `folder` if the block ends without an exception."""
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what, remedy = f"cannot be written: {error.strerror}", "Set XDG_CACHE_HOME to a writable folder."
        raise machine_fault(error) or UserError(what, where=str(folder.parent), remedy=remedy) from None
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process has built the same base in the meantime
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
