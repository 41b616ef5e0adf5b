"""Tokenization of text in which a completion follows exactly the prompt tokens that a server sends.

A row is tokenized as a whole and split where the prompt ends, as with `apply_chat_template(tokenize=True)`: a
SentencePiece tokenizer adds a space before every text that it tokenizes alone. If a token would span the split, or
the completion would change the prompt's last tokens, the prompt keeps the tokens that it has alone, followed by
those of the completion, as in generation by a policy.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "a", ".")
"""Characters put before a completion that is tokenized alone, since it is not the beginning of a text."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A token sequence; for each token, whether it is the agent's; and whether the sequence was truncated."""

    ids: list[int]
    spoken: list[bool]
    cut: bool = False

    @classmethod
    def joined(cls, prompt: list[int], completion: list[int]) -> "Tokens":
        """Join a prompt and its completion."""
        return cls([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))

    def first(self, length: int | None) -> "Tokens":
        """Return at most the first `length` tokens; all if it is None."""
        if length is None or len(self.ids) <= length:
            return self
        return Tokens(self.ids[:length], self.spoken[:length], cut=True)

    def prompt_length(self) -> int:
        """Return the number of tokens before the agent's first one."""
        return self.spoken.index(True)

    def completion_length(self) -> int:
        """Return the number of tokens from the agent's first one on."""
        return len(self.ids) - self.prompt_length()


class RowTokenizer:
    """Tokenizes prompts and completions.

    Args:
        end: the token that ends a completion in a dialogue, as text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: str) -> None:
        self._tokenizer, self._end = tokenizer, end
        self._added = set(tokenizer.added_tokens_decoder)
        self._known = lru_cache(maxsize=1024)(self.ids)

    def ids(self, text: str) -> list[int]:
        """Tokenize a rendered dialogue or a part of one, which contains its special tokens as text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Tokenize a plain text that continues: with the tokenizer's special tokens except the end token."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids

    def text_row(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Tokenize a plain text and its continuation, without an end token."""
        prompt_ids = self.text_ids(prompt)
        return prompt_ids, self._following(prompt_ids, self.text_ids(prompt + completion), completion)

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[Tokens]:
        """Tokenize prompts with completions; pairs that extend one another, as in a dialogue, become one row."""
        rows: list[Tokens] = []
        for chain in _chains(pairs):
            row = self._at_once(chain)
            rows.extend([row] if row is not None else self._one_by_one(chain))
        return rows

    def _at_once(self, chain: Sequence[tuple[str, str]]) -> Tokens | None:
        """Return the last pair's row, which contains the others; None if a split is not at a token boundary."""
        if not self._tokenizer.is_fast:
            return None  # slow tokenizers return no offsets
        text = "".join(chain[-1])
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoding["input_ids"]
        starts = [start for start, _ in encoding["offset_mapping"]]
        spoken = [False] * len(ids)
        for prompt, completion in chain:
            begin = self._prompt_end(prompt, ids, starts)
            last = bisect_left(starts, len(prompt) + len(completion) - len(self._end))
            if begin is None or last >= len(ids) or starts[last] != len(prompt) + len(completion) - len(self._end):
                return None
            spoken[begin : last + 1] = [True] * (last + 1 - begin)
        return Tokens(ids, spoken)

    def _prompt_end(self, prompt: str, ids: list[int], starts: list[int]) -> int | None:
        """Return the prompt's number of tokens in a row; None if the prompt has other tokens alone.

        Tokenizers split text at added tokens first, so only what follows the last of these is compared.
        """
        first = bisect_left(starts, len(prompt)) - 1
        while first > 0 and ids[first] not in self._added:
            first -= 1
        alone = self._known(prompt[starts[first] :] if first > 0 else prompt)
        first = max(first, 0)
        end = first + len(alone)
        return end if ids[first:end] == alone else None

    def _one_by_one(self, chain: Sequence[tuple[str, str]]) -> list[Tokens]:
        rows: list[Tokens] = []
        for prompt, completion in chain:
            prompt_ids = self.ids(prompt)
            row = Tokens.joined(prompt_ids, self._following(prompt_ids, self.ids(prompt + completion), completion))
            if rows and prompt_ids[: len(rows[-1].ids)] == rows[-1].ids:
                earlier = rows.pop()
                row.spoken[: len(earlier.ids)] = earlier.spoken
            rows.append(row)
        return rows

    def _following(self, prompt: list[int], whole: list[int], completion: str) -> list[int]:
        """Return a completion's tokens, which follow the prompt's; `whole` are the tokens of both together."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        for anchor in _ANCHORS:
            before, ids = self.ids(anchor), self.ids(anchor + completion)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.ids(completion)


def _chains(pairs: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group consecutive pairs in which each prompt starts with the previous prompt and completion."""
    chain: list[tuple[str, str]] = []
    for prompt, completion in pairs:
        if chain and not prompt.startswith("".join(chain[-1])):
            yield chain
            chain = []
        chain.append((prompt, completion))
    if chain:
        yield chain
