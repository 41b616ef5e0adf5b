"""Settings of the rewards that depend on a model's own completions: the word, the length and the ratings."""

import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.grid import prompts
from benchmarks.grid.models import kind_of
from benchmarks.grid.prompts import Kind
from benchmarks.grid.stories import complete
from benchmarks.rewards import cheerful_words

SAMPLES = 8
"""Completions per training prompt."""
RARE = 0.05
"""Approximate share of the base's completions that contain the word of the sparse reward."""
SHORTER = 0.6
"""Target length as a share of the base's mean length."""
NOISE = 0.1
"""Share of the ratings that are wrong."""


@dataclass(frozen=True)
class Facts:
    """The chosen settings, and the base's statistics for them."""

    word: str
    word_share: float
    characters: int
    mean_characters: float
    cheerful_at_least: int
    """Smallest number of cheerful words for which a simulated rater gives a thumb up."""
    cheerful_share: float


def written(prompt: str, kind: Kind) -> str | list[dict[str, str]]:
    """Return a prompt in TRL's format."""
    return prompt if kind == "text" else [{"role": "user", "content": prompt}]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], kind: Kind) -> list[list[int]]:
    """Tokenize prompts with plain transformers."""
    if kind == "chat":
        texts = [
            tokenizer.apply_chat_template(written(prompt, kind), tokenize=False, add_generation_prompt=True)
            for prompt in asked
        ]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [tokenizer(prompt)["input_ids"] for prompt in asked]


def learn_facts(model: str, folder: Path, cache: Path, max_new_tokens: int) -> tuple[Facts, Path]:
    """Return the facts of a model and the file of its ratings, both computed once and cached.

    Args:
        folder: folder of the model.
        max_new_tokens: largest length of a completion.
    """
    kept = cache / "facts" / f"{model}-{max_new_tokens}.json"
    ratings = kept.with_suffix(".jsonl")
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kind = kind_of(model)
        asked = [prompt for prompt in prompts.training(kind) for _ in range(SAMPLES)]
        texts = _answers(folder, asked, kind, max_new_tokens)
        facts = _choose(texts, asked)
        rows = _rated(asked, texts, kind, facts.cheerful_at_least)
        ratings.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        kept.write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    return Facts(**json.loads(kept.read_text(encoding="utf-8"))), ratings


def _answers(folder: Path, asked: Sequence[str], kind: Kind, max_new_tokens: int) -> list[str]:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = complete(model, tokenizer, prompt_ids(tokenizer, asked, kind), max_new_tokens)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in drawn]


def _choose(texts: Sequence[str], asked: Sequence[str]) -> Facts:
    said = {word for prompt in asked for word in _words(prompt)}
    seen = Counter(word for text in texts for word in _words(text) - said)
    word = min(sorted(seen), key=lambda one: abs(seen[one] / len(texts) - RARE))
    length = statistics.fmean(map(len, texts))
    cheerful = cheerful_words(texts)

    def share(at_least: int) -> float:
        return sum(count >= at_least for count in cheerful) / len(texts)

    at_least = min(range(1, 10), key=lambda count: abs(share(count) - 0.5))
    return Facts(word, seen[word] / len(texts), round(SHORTER * length), length, at_least, share(at_least))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b[a-z]{4,}\b", text.lower()))


def _rated(asked: Sequence[str], texts: Sequence[str], kind: Kind, at_least: int) -> list[dict[str, object]]:
    """Rate the part of the completions that people see, which is the text after the thinking."""
    rng, seen = random.Random(0), [text.rpartition("</think>")[2].strip() for text in texts]
    return [
        {
            "prompt": written(prompt, kind),
            "completion": written_answer(text, kind),
            "label": (count >= at_least) != (rng.random() < NOISE),
        }
        for prompt, text, count in zip(asked, seen, cheerful_words(seen), strict=True)
        if text
    ]


def written_answer(text: str, kind: Kind) -> str | list[dict[str, str]]:
    """Return a completion in the format in which TRL passes it to reward functions."""
    return text if kind == "text" else [{"role": "assistant", "content": text}]
