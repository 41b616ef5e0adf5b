"""Pretraining text of the grid's models: stories sampled from the 656K Llama."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.grid import prompts

STORIES = 3000
"""Number of stories of each kind: plain text, and answers to requests."""
LENGTH = 160
"""Largest number of new tokens of a story."""
TEMPERATURE = 0.7
BATCH = 256
END = "<|"
"""The Llama writes `<|end_story|>` in pieces before its end token."""
SENTENCES = (2, 3, 4)
"""Sentences of an answer to a request, in rotation; short, so that a chat model's answers end."""

Row = dict[str, Any]


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    length: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Sample one completion per row of tokens with transformers' `generate`, including its end token.

    Draws from torch's global generator.
    """
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    completions: list[list[int]] = []
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        longest = max(map(len, some))
        ids_BP = torch.tensor([[pad] * (longest - len(row)) + row for row in some])
        mask_BP = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in some])
        out_BL = model.generate(
            ids_BP,
            attention_mask=mask_BP,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=pad,
        )
        for row in out_BL[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            completions.append(row[: end + 1])
    return completions


def tell(llama: Path, file: Path) -> list[Row]:
    """Return rows of `text` (a story), whether it `ended`, `request` and `answer`, cached as JSON lines."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = _tell(llama)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.rename(file)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _tell(llama: Path) -> list[Row]:
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    openings = [opening for _, opening in prompts.others("text")[: STORIES // 2]]
    begun = [tokenizer(opening)["input_ids"] for opening in openings]
    begun += [[tokenizer.bos_token_id]] * (STORIES - len(begun))
    told = complete(model, tokenizer, begun, LENGTH, TEMPERATURE)
    texts = [_decode(tokenizer, start + rest).partition(END) for start, rest in zip(begun, told, strict=True)]

    asked = prompts.others("chat")[:STORIES]
    begun = [tokenizer(opening)["input_ids"] for _, opening in asked]
    told = complete(model, tokenizer, begun, LENGTH // 2, TEMPERATURE)
    rows = []
    for index, ((request, _), start, rest) in enumerate(zip(asked, begun, told, strict=True)):
        answer, _, _ = _decode(tokenizer, start + rest).partition(END)
        text, ended, _ = texts[index]
        rows.append(
            {
                "text": text.strip(),
                "ended": bool(ended),
                "request": request,
                "answer": _sentences(answer, SENTENCES[index % len(SENTENCES)]),
            }
        )
    return rows


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _sentences(text: str, count: int) -> str:
    """Return the first `count` sentences of a text."""
    ends = [match.end() for match in re.finditer(r'[.!?]"?(?=\s|$)', text)]
    return text[: ends[min(count, len(ends)) - 1]] if ends else text.strip()
