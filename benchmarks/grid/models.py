"""The grid's models: the 656K Llama, and three other architectures, each with its own tokenizer.

They are built once and cached: `python -m benchmarks.grid.models --cache DIR`, one or two CPU minutes each.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from benchmarks.grid import stories
from benchmarks.grid.prompts import Kind
from perl.backbones.build import pretrain
from perl.system.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT.parent / "shared" / "models" / "tinystories-656k"
STEPS, LENGTH = 500, 112
"""Optimizer steps of pretraining, and largest number of tokens of a story."""
BATCH_TOKENS = 16 * LENGTH
"""Approximate number of tokens per step."""
LEARNING_RATE = 3e-3
INITIALIZER_RANGE = 0.06
"""Standard deviation of the initial weights; with transformers' 0.02, models this narrow start to learn later."""


@dataclass(frozen=True)
class Stranger:
    """A model to build.

    Attributes:
        special: tokens in addition to those of the byte-level BPE; the first is the padding in pretraining.
        vocabulary: total number of tokens.
        config: makes the configuration from the vocabulary's size and the end token.
    """

    kind: Kind
    special: tuple[str, ...]
    vocabulary: int
    config: Callable[[int, int], PretrainedConfig]


def _gpt2(vocabulary: int, end: int) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=vocabulary,
        n_embd=96,
        n_layer=4,
        n_head=4,
        n_positions=256,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=end,
        eos_token_id=end,
    )


def _gpt_neo(vocabulary: int, end: int) -> PretrainedConfig:
    return GPTNeoConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=32,
        max_position_embeddings=256,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=end,
        eos_token_id=end,
    )


def _qwen3(vocabulary: int, end: int) -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=0,
        eos_token_id=end,
        pad_token_id=0,
    )


STRANGERS = {
    "gpt2": Stranger("text", ("<|endoftext|>",), 3000, _gpt2),
    "gpt-neo": Stranger("text", ("<|endoftext|>",), 1000, _gpt_neo),
    "qwen3": Stranger("chat", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), 2000, _qwen3),
}
MODELS = ("llama", *STRANGERS)


def kind_of(model: str) -> Kind:
    """Return whether the model takes plain text or chat messages."""
    return STRANGERS[model].kind if model in STRANGERS else "text"


def model_folder(model: str, cache: Path, llama: Path) -> Path:
    """Return the folder of a model, which is built if it is not cached."""
    if model == "llama":
        return llama
    folder = cache / "models" / model
    if not folder.exists():
        _build(STRANGERS[model], stories.tell(llama, cache / "stories.jsonl"), folder)
    return folder


def _build(stranger: Stranger, rows: list[stories.Row], folder: Path) -> None:
    tokenizer = _tokenizer(stranger, rows)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(stranger.config(len(tokenizer), end), dtype=torch.float32)
    texts = [_row(stranger, tokenizer, row, short=index % 2 == 1)[:LENGTH] for index, row in enumerate(rows)]
    pretrain(model, texts, STEPS, BATCH_TOKENS, LEARNING_RATE, seed=0)
    if stranger.kind == "chat":  # as Qwen3's own generation_config.json
        model.generation_config.eos_token_id = [end, 0]
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def _tokenizer(stranger: Stranger, rows: list[stories.Row]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=stranger.vocabulary,
        special_tokens=list(stranger.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in rows] + [row["request"] for row in rows], trainer)
    if stranger.kind == "text":
        (end,) = stranger.special
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)
    tokenizer.add_tokens(["<think>", "</think>"])
    template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


def _row(stranger: Stranger, tokenizer: PreTrainedTokenizerBase, row: stories.Row, short: bool) -> list[int]:
    """Return the tokens of a chat or, for text models, of a long or short story."""
    if stranger.kind == "text":
        text, ended = (row["answer"], True) if short else (row["text"], row["ended"])
        return [*tokenizer(text)["input_ids"], *[tokenizer.eos_token_id] * ended]
    messages = [{"role": "user", "content": row["request"]}, {"role": "assistant", "content": row["answer"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def main() -> None:
    """Build all models that are not cached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid.models", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="Folder for the models.")
    parser.add_argument("--llama", type=Path, default=LLAMA, metavar="DIR", help="The 656K Llama.")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)  # several threads that wait for each other are slow on a shared machine
    for model in MODELS:
        print(model_folder(model, arguments.cache, arguments.llama))


if __name__ == "__main__":
    main()
