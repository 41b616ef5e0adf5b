"""Turns to tokens: the chat format, and which tokens are the agent's to learn.

Text is tokenized in segments that end where the agent begins or stops speaking, so that the context of an
answer has the same tokens in SFT, in the reward model and in RL, whatever follows it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from perl.data.records import Turn
from perl.errors import UserError

MESSAGE_ROLES = {"system": "system", "user": "user", "agent": "assistant", "api": "tool"}

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for m in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Agent', 'tool': 'Api'}[m.role] }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Agent:{% endif %}"
)
"""For tokenizers that bring no chat template of their own. A bare newline after a block would be trimmed."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence and, for each token, whether the agent said it."""

    ids: list[int]
    spoken: list[bool]

    def last(self, length: int) -> "Tokens":
        """The last `length` tokens: older context is cut off first."""
        return Tokens(self.ids[-length:], self.spoken[-length:])


class ChatFormat:
    """How a tokenizer writes dialogues, and which token ends the agent's turn.

    Raises:
        UserError: the tokenizer has no end-of-sequence token, or its template no end-of-turn token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end token",
                where=tokenizer.name_or_path,
                remedy="Set eos_token in tokenizer_config.json.",
            )
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self._end_of_turn = self._find_end_of_turn()
        self.end_id: int = tokenizer.convert_tokens_to_ids(self._end_of_turn)
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self._find_pad()
        described = f"{tokenizer.chat_template}\0{self.end_id}\0{self.eos_id}"
        self.sha256 = hashlib.sha256(described.encode()).hexdigest()

    def context(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens of a context, up to where the agent's answer begins."""
        if turns[-1].speaker == "text":
            return self._tokenize_text(turns)
        text = self._render(turns, add_generation_prompt=True)
        return self._tokenize(self._segments(turns, text, first=len(turns))).ids

    def answer(self, context: Sequence[Turn], answer: Turn) -> list[int]:
        """The tokens of an answer, its end-of-turn included."""
        if answer.speaker == "text":
            return [*self._ids(answer.text), self.eos_id]
        return self.dialogue(context, [answer]).ids[len(self.context(context)) :]

    def dialogue(self, context: Sequence[Turn], answer: Sequence[Turn]) -> Tokens:
        """A context and how it went on; the agent's turns of the answer are marked as spoken.

        The sequence ends with the last agent turn: nothing after it could be learnt.
        """
        if answer[-1].speaker == "text":
            prompt, completion = self._tokenize_text(context), self.answer(context, answer[-1])
            return Tokens(prompt + completion, [False] * len(prompt) + [True] * len(completion))
        last = max(index for index, turn in enumerate(answer) if turn.speaker == "agent")
        turns = [*context, *answer[: last + 1]]
        return self._tokenize(self._segments(turns, self._render(turns), first=len(context)))

    def row(self, context: Sequence[Turn], answer: Turn, length: int) -> list[int]:
        """The tokens of a context and the answer to score, at most `length`: older context is cut off first."""
        return self.dialogue(context, [answer]).last(length).ids

    def ends(self, context: Sequence[Turn]) -> int:
        """The token that ends an answer to this context."""
        return self.eos_id if context[-1].speaker == "text" else self.end_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its end-of-turn."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        messages = [{"role": MESSAGE_ROLES[turn.speaker], "content": turn.text} for turn in turns]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template raises whatever its author chose
            raise UserError(
                f"the chat template refuses a dialogue of {', '.join(t.speaker for t in turns)}: {error}",
                where=self.tokenizer.name_or_path,
                remedy="Use a base whose chat template takes these roles in this order.",
            ) from None
        assert isinstance(text, str)
        return text

    def _segments(self, turns: Sequence[Turn], text: str, first: int) -> Iterator[tuple[str, bool]]:
        """Cut a rendered dialogue where the agent begins and stops; True marks agent turns from `first`."""
        done = 0
        for index, turn in enumerate(turns):
            if turn.speaker != "agent":
                continue
            said = turn.text.strip()
            # Templates refuse an empty conversation: where the agent speaks first, its words show the start.
            before = self._render(turns[:index], add_generation_prompt=True) if index else text[: text.find(said)]
            at = text.find(said, len(before))
            end = text.find(self._end_of_turn, at + len(said))
            if not text.startswith(before) or at < 0 or end < 0:
                raise UserError(
                    f"the chat template rewrites the agent's turn {said[:60]!r}, or what came before it",
                    where=self.tokenizer.name_or_path,
                    remedy="Use a base whose chat template writes every turn as it was said.",
                )
            end += len(self._end_of_turn)
            yield text[done : len(before)], False
            yield text[len(before) : end], index >= first
            done = end
        if turns[-1].speaker != "agent":
            yield text[done:], False

    def _tokenize(self, segments: Iterable[tuple[str, bool]]) -> Tokens:
        tokens = Tokens([], [])
        for text, spoken in segments:
            ids = self._ids(text)
            tokens.ids.extend(ids)
            tokens.spoken.extend([spoken] * len(ids))
        return tokens

    def _tokenize_text(self, turns: Sequence[Turn]) -> list[int]:
        ids: list[int] = self.tokenizer("".join(turn.text for turn in turns))["input_ids"]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_id else ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _find_end_of_turn(self) -> str:
        """The first special token that the template writes after the agent's last word."""
        word = "pangolin"
        rest = self._render([Turn("user", "hello"), Turn("agent", word)]).rpartition(word)[2]
        found = [(rest.find(token), token) for token in self.tokenizer.all_special_tokens if token in rest]
        if not found:
            raise UserError(
                "the chat template does not end the agent's turn with a special token",
                where=self.tokenizer.name_or_path,
                remedy="Add the end token after the assistant's content in the chat template.",
            )
        token: str = min(found)[1]
        return token

    def _find_pad(self) -> int:
        """A token for padding that is not the end: masks, not this id, say what is padding."""
        tokenizer = self.tokenizer
        ends = {self.end_id, self.eos_id}
        for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
            if candidate is not None and candidate not in ends:
                return int(candidate)
        return next(i for i in range(len(tokenizer)) if i not in ends)
