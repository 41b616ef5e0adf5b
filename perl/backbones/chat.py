"""The chat format: conversion of turns to tokens, which tokens are trained on, and which end a completion.

The context of a completion has the same tokens in SFT, in the reward model and in RL: those that a server sends.
`perl.backbones.template` locates the completion, and `perl.backbones.tokens` tokenizes both. Dialogues that are
too long are truncated: system turns are kept, and the oldest other turns are dropped, whole turns first.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from perl.backbones.template import ASKED, Template
from perl.backbones.tokens import RowTokenizer, Tokens
from perl.data.records import Speaker, Turn
from perl.errors import UserError

_T = TypeVar("_T")


class ChatFormat:
    """How a tokenizer formats dialogues, and which tokens end the agent's turn.

    Attributes:
        first_ids: the tokens that the decoder of an encoder-decoder gets before a completion.
        end_id: the template's token at the end of a completion, used in rows.
        eos_id: the tokenizer's end token, used at the end of plain text.
        end_ids: all tokens that end a completion: both, and those of the model's generation configuration.

    Args:
        more_ends: the end tokens of the generation configuration.

    Raises:
        UserError: the tokenizer has no end-of-sequence token, or its template cannot be used.
    """

    first_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more_ends: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            remedy = "Set eos_token in tokenizer_config.json."
            raise UserError("the tokenizer has no end token", where=tokenizer.name_or_path, remedy=remedy)
        self.template = Template(tokenizer)
        self._tokens = RowTokenizer(tokenizer, self.template.end)
        self.end_id: int = tokenizer.convert_tokens_to_ids(self.template.end)
        self.eos_id: int = tokenizer.eos_token_id
        # A token that the template writes inside a completion does not end it, whatever the configuration says.
        inside = set(self._tokens.ids(self.template.row(ASKED)[1])[:-1])
        self._more_ends = sorted({one for one in more_ends if 0 <= one < len(tokenizer)} - inside)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((self.end_id, self.eos_id, *self._more_ends)))
        self.pad_id: int = self._find_pad()
        described = f"{tokenizer.chat_template}\0{self.end_id}\0{self.eos_id}\0{self.end_ids}"
        self.sha256 = hashlib.sha256(described.encode()).hexdigest()

    def context(self, turns: Sequence[Turn], length: int | None = None) -> list[int]:
        """Return the tokens of a context up to the start of the agent's completion, as a server sends them.

        Args:
            length: maximum number of tokens; the oldest turns, or the oldest text, are dropped.
        """
        if turns[-1].speaker == "text":
            return self._cut_text(self._tokens.text_ids(text_of(turns)), length)
        ids = self._prompt(turns)
        if length is None or len(ids) <= length:
            return ids
        kept, _ = newest_turns(turns, len(turns), lambda some, _: len(self._prompt(some)), length)
        return _drop_middle(self._prompt(kept), 1, length)

    def completion(self, context: Sequence[Turn], completion: Turn) -> list[int]:
        """Return the tokens of a completion, including its end token."""
        row = self.row(context, completion)
        return row.ids[row.prompt_length() :]

    def row(self, context: Sequence[Turn], completion: Turn, length: int | None = None) -> Tokens:
        """Return the row of a context and a completion, which is scored at its end token.

        Args:
            length: maximum number of tokens; first the context is truncated as in `context`, then the
                completion's beginning.
        """
        if completion.speaker == "text":
            row = self._text_row(context, completion, length)
        else:
            row = self._fitting_row([*context, completion], len(context), length)
        if length is None or len(row.ids) <= length:
            return row
        head = max(1, min(row.prompt_length(), length - sum(row.spoken)))
        return Tokens(_drop_middle(row.ids, head, length), _drop_middle(row.spoken, head, length), cut=True)

    def rows(self, context: Sequence[Turn], completion: Sequence[Turn], length: int | None = None) -> list[Tokens]:
        """Return rows of a context and all turns after it, of which the agent's are trained on (`spoken`).

        It is one row if the template formats an agent's turn the same way whether or not it is the last; otherwise
        each of these turns gets its own row, as it will be generated.

        Args:
            length: maximum number of tokens per row; the oldest turns are dropped, then the completion's end.
        """
        if completion[-1].speaker == "text":
            return [self._text_row(context, completion[-1], length).first(length)]
        spoken = [index for index, turn in enumerate(completion, len(context)) if turn.speaker == "agent"]
        turns = [*context, *completion][: spoken[-1] + 1]  # nothing after it is trained on
        rows = self._rows(turns, len(context))
        if length is None or max(len(row.ids) for row in rows) <= length:
            return rows
        if len(rows) == 1:
            rows = [self._fitting_row(turns, len(context), length)]
        else:
            rows = [self._fitting_row(turns[: index + 1], index, length) for index in spoken]
        return [row.first(length) for row in rows]

    def ends(self, context: Sequence[Turn]) -> tuple[int, ...]:
        """Return the tokens that end a completion of this context, starting with the one used in rows."""
        if context[-1].speaker == "text":
            return tuple(dict.fromkeys((self.eos_id, *self._more_ends)))
        return self.end_ids

    def decode(self, ids: Sequence[int], continued: Sequence[int] = ()) -> str:
        """Return the text of a completion, without its end token.

        Args:
            continued: tokens of the plain text that the completion continues; its leading and trailing whitespace
                is then kept. Without it, as in chats, whitespace is stripped, as templates do.
        """
        kept = list(ids[:-1] if ids and ids[-1] in self.end_ids else ids)
        if not continued:
            return self._decoded(kept).strip()
        # Some tokenizers drop a leading space, so the completion is decoded together with the token before it.
        before, both = self._decoded(continued[-1:]), self._decoded([*continued[-1:], *kept])
        return both.removeprefix(before) if both.startswith(before) else self._decoded(kept)

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def probe(self, speakers: Iterable[Speaker]) -> list[str]:
        """Compare a dialogue of these speakers with the output of the tokenizer's own `apply_chat_template`.

        Returns:
            Warnings about the format of completions.

        Raises:
            UserError: the template refuses or omits a speaker, or a server would send other tokens.
        """
        turns = self.probe_turns(set(speakers))
        self.template.check_written(turns[:-1])
        messages = self.template.messages(turns)
        ours, row = self.context(turns[:-1]), self.row(turns[:-1], turns[-1])
        options: dict[str, Any] = {"tokenize": True, "return_dict": False}
        sent = self.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        if list(sent) != ours:
            what = "the tokenizer's chat template produces other tokens than tokenizing its text"
            remedy = "Provide the tokenizer as tokenizer.json, which transformers loads as a fast tokenizer."
            raise UserError(what, where=self.tokenizer.name_or_path, remedy=remedy)
        finished = list(self.tokenizer.apply_chat_template(messages, **options))
        if finished[: len(row.ids) - 1] == row.ids[:-1]:
            return []
        prompt = self.tokenizer.decode(ours[-3:])
        return [
            f"the chat template's prompt ends in {prompt!r}, where a finished dialogue has other tokens: "
            "completions are trained on and scored after the prompt, as a server generates them"
        ]

    @staticmethod
    def probe_turns(speakers: set[Speaker]) -> list[Turn]:
        """Return a dialogue of all these speakers."""
        turns = [Turn("system", "capybara")] if "system" in speakers else []
        turns += ASKED
        if "api" in speakers:
            turns += [Turn("api", "axolotl"), Turn("agent", "wombat")]
        return [*turns, Turn("user", "okapi"), Turn("agent", "numbat")]

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        return self._tokens.ids(self.template.prompt(turns))

    def _rows(self, turns: Sequence[Turn], first: int) -> list[Tokens]:
        ends = [index + 1 for index in range(first, len(turns)) if turns[index].speaker == "agent"]
        return self._tokens.rows([self.template.row(turns[:end]) for end in ends])

    def _fitting_row(self, turns: Sequence[Turn], first: int, length: int | None) -> Tokens:
        """Return the row that ends with the last completion."""
        row = self._rows(turns, first)[-1]
        if length is None or len(row.ids) <= length:
            return row
        kept = newest_turns(turns, first, lambda some, at: len(self._rows(some, at)[-1].ids), length)
        row = self._rows(*kept)[-1]
        return Tokens(row.ids, row.spoken, cut=True)

    def _text_row(self, context: Sequence[Turn], completion: Turn, length: int | None) -> Tokens:
        prompt, completion_ids = self._tokens.text_row(text_of(context), completion.text)
        completion_ids = [*completion_ids, self.eos_id]
        kept = self._cut_text(prompt, None if length is None else max(1, length - len(completion_ids)))
        row = Tokens.joined(kept, completion_ids)
        return Tokens(row.ids, row.spoken, cut=len(kept) < len(prompt))

    def _cut_text(self, ids: list[int], length: int | None) -> list[int]:
        """Return the tokenizer's first special token and the newest text."""
        if length is None or len(ids) <= length:
            return ids
        framed = ids[0] in self.tokenizer.all_special_ids
        return _drop_middle(ids, int(framed), length)

    def _find_pad(self) -> int:
        """Return a padding token that ends no row; padding is identified by masks, not by this id."""
        tokenizer, ends = self.tokenizer, {None, self.end_id, self.eos_id}
        special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
        return next(int(token) for token in (*special, *range(len(tokenizer))) if token not in ends)


def _drop_middle(items: list[_T], head: int, length: int) -> list[_T]:
    """Return the first `head` and the last items, `length` in total."""
    if len(items) <= length:
        return items
    return [*items[:head], *items[len(items) - max(0, length - head) :]][:length]


def text_of(turns: Sequence[Turn]) -> str:
    """Join turns of plain text."""
    return "".join(turn.text for turn in turns)


Size = Callable[[Sequence[Turn], int], int]
"""Returns the number of tokens of a dialogue whose turns from an index on are the completion."""


def newest_turns(turns: Sequence[Turn], first: int, size: Size, limit: int) -> tuple[list[Turn], int]:
    """Return the system turns and as many of the newest other turns as fit, starting with a user turn.

    If not even the last user turn and what follows fit, the longest of these turns are truncated at the beginning,
    then the system turn at the end; completions are not truncated.

    Args:
        turns: a context, then the completion.
        first: index at which the completion begins.
        limit: in tokens.

    Returns:
        The turns, which exceed the limit only if the completion alone does, and the index at which it begins.
    """
    system = next((index for index, turn in enumerate(turns) if turn.speaker != "system"), len(turns))

    def since(start: int) -> tuple[list[Turn], int]:
        return [*turns[:system], *turns[start:]], max(system, system + first - start)

    completions = [index for index in range(first, len(turns)) if turns[index].speaker == "agent"]
    last = completions[-1] if completions else len(turns)
    starts = [index for index in range(system, last) if turns[index].speaker == "user"]
    if not starts:
        return _shortened(turns, first, size, limit)
    enough = bisect_left(starts, True, key=lambda start: size(*since(start)) <= limit)
    if enough < len(starts):
        return since(starts[enough])
    return _shortened(*since(starts[-1]), size, limit)


def _shortened(turns: Sequence[Turn], first: int, size: Size, limit: int) -> tuple[list[Turn], int]:
    turns = list(turns)
    others = [index for index, turn in enumerate(turns) if index < first or turn.speaker != "agent"]
    while others and (tokens := size(turns, first)) > limit:
        longest = max(others, key=lambda index: len(turns[index].text) * (turns[index].speaker != "system"))
        longest = longest if turns[longest].text else others[0]
        speaker, text = turns[longest].speaker, turns[longest].text
        if not text:
            break
        characters = sum(len(turn.text) for turn in turns)
        drop = max(1, (tokens - limit) * characters // tokens)
        turns[longest] = Turn(speaker, text[: -drop or None] if speaker == "system" else text[drop:])
    return turns, first
