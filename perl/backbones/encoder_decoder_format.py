"""The format of rows for encoder-decoders: the context, `START`, and the completion."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from perl.backbones.chat import ChatFormat, text_of
from perl.backbones.tokens import Tokens
from perl.data.records import Turn

START = -1
"""Marks where the decoder begins; not a token, so no text or policy can produce it."""


class EncoderDecoderFormat(ChatFormat):
    """The format of dialogues for an encoder-decoder: a context and a completion, tokenized separately.

    A context is framed by the tokenizer like any text (T5: an end token after it; BART: a token on either side).
    The tokens before a text also precede the completion in the decoder, as in these models' training.

    Attributes:
        first_ids: the decoder's tokens between its start token and the completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more_ends: Iterable[int] = ()) -> None:
        super().__init__(tokenizer, more_ends)
        plain, framed = self._tokens.ids("a"), list(tokenizer("a")["input_ids"])
        at = next(place for place in range(len(framed)) if framed[place : place + len(plain)] == plain)
        self.first_ids = tuple(framed[:at])
        self._last_ids = tuple(framed[at + len(plain) :])
        self._around = 2 * len(self.first_ids) + len(self._last_ids) + 1

    def context(self, turns: Sequence[Turn], length: int | None = None) -> list[int]:
        """Return the encoder's tokens (at least one of the text's), `START`, and the decoder's first tokens."""
        room = None if length is None else max(1, length - self._around)
        if turns[-1].speaker == "text":
            ids = self._tokens.ids(text_of(turns))
            return self._framed(ids if room is None else ids[-room:])
        return self._framed(super().context(turns, room))

    def _framed(self, ids: Sequence[int]) -> list[int]:
        return [*self.first_ids, *ids, *self._last_ids, START, *self.first_ids]

    def row(self, context: Sequence[Turn], completion: Turn, length: int | None = None) -> Tokens:
        """Return the row as for a decoder."""
        room = None if length is None else max(1, length - self._around - 1)
        written, ids = self._written(context, completion)
        kept = ids if room is None else ids[-room:]
        row = self._joined(context, written, kept, length)
        return row if len(kept) == len(ids) else Tokens(row.ids, row.spoken, cut=True)

    def rows(self, context: Sequence[Turn], completion: Sequence[Turn], length: int | None = None) -> list[Tokens]:
        """Return a row for each of the agent's turns, with all previous turns as its context."""
        turns = [*context, *completion]
        rows = []
        for index in range(len(context), len(turns)):
            if turns[index].speaker in ("agent", "text"):
                written, ids = self._written(turns[:index], turns[index])
                rows.append(self._joined(turns[:index], written, ids, length).first(length))
        return rows

    def _written(self, context: Sequence[Turn], completion: Turn) -> tuple[str, list[int]]:
        """Return the template's text before a completion, and the completion's tokens."""
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

    def decode(self, ids: Sequence[int], continued: Sequence[int] = ()) -> str:
        """Strip whitespace in any case: the decoder always begins a new text."""
        return super().decode(ids)

    def probe(self, speakers: Iterable[Any]) -> list[str]:
        """Refuse a template that omits a speaker; there are no server's tokens to compare with."""
        self.template.check_written(self.probe_turns(set(speakers))[:-1])
        return []
