"""The chat template: a dialogue as text, and where in it a completion stands.

A completion follows the prompt that the template writes to ask for one: that is what a server sends and a policy
continues, so SFT and reward models read it before a completion too. Most templates write a last completion after
this prompt, with their own text around it (Qwen3's empty thoughts, gpt-oss's channel), and it is taken from there.
Some do not: DeepSeek-R1's prompt opens `<think>`, of which the finished dialogue has no trace. There the
completion is written as it is in the data; where it has no reasoning, what the prompt opened is closed first.

Earlier completions are context, in whatever way the template writes them (Qwen3 drops their thoughts).
"""

import re
from collections.abc import Sequence
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

ASKED = (Turn("user", "armadillo"), Turn("agent", "pangolin"))
"""A question and its answer, in words that no template has of its own."""

_THINK_CLOSED = re.compile(r".*</\w*think\w*>", re.DOTALL)
"""A text up to where its reasoning ends."""
_THINK_OPENED = re.compile(r"<(\w*think\w*)>\s*$")


class Template:
    """How a tokenizer writes dialogues as text.

    Attributes:
        end: the token that ends a completion, as text.
        closing: what has to be added after a completion that the template does not end; mostly nothing.
        after: how many characters the template writes after the end of a last completion.

    Raises:
        UserError: the template refuses a question with its answer, leaves out what is said, or writes no token
            between a completion and what follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self._in_parts = False
        self._in_parts = self._wants_parts()
        self.closing = ""
        self.end, self.after = self._find_end()

    def prompt(self, turns: Sequence[Turn]) -> str:
        """A context, up to where the agent's completion begins."""
        return self._render(turns, add_generation_prompt=True)

    def row(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """The prompt before the last turn, which is the agent's, and the completion with its end.

        Raises:
            UserError: the template refuses these turns, or writes other words than the agent said.
        """
        said, whole = turns[-1].text.strip(), self._render(turns)
        whole = whole[: len(whole) - self.after] + self.closing
        # Templates refuse an empty conversation: where the agent speaks first, its words show the start.
        prompt = self.prompt(turns[:-1]) if turns[1:] else whole.partition(said)[0]
        completion = whole.removeprefix(prompt)
        if not whole.endswith(self.end) or _squeezed(_THINK_CLOSED.sub("", said)) not in _squeezed(whole):
            raise UserError(
                f"the chat template rewrites the agent's turn {said[:60]!r}",
                where=self._tokenizer.name_or_path,
                remedy="Use a base whose chat template writes the last turn as it was said.",
            )
        if whole.startswith(prompt) and _squeezed(said) in _squeezed(completion):
            return prompt, completion
        return prompt, self._as_said(prompt, said)

    def writes_after_prompt(self) -> bool:
        """Whether the template writes a completion without reasoning after the prompt that asks for it."""
        return self._render(ASKED).startswith(self.prompt(ASKED[:1]))

    def opened(self, prompt: str) -> str | None:
        """The name of the tag for reasoning that a prompt ends in; None: it ends in none."""
        found = _THINK_OPENED.search(prompt)
        return found[1] if found else None

    def _as_said(self, prompt: str, said: str) -> str:
        """The completion after a prompt that the template does not write it after."""
        if tag := self.opened(prompt):
            reasons = f"</{tag}>" in said
            said = said.removeprefix(f"<{tag}>").lstrip() if reasons else f"</{tag}>\n\n{said}"
        return said + self.end

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        try:
            text: Any = self._tokenizer.apply_chat_template(
                self.messages(turns), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template raises whatever its author chose
            raise UserError(
                f"the chat template refuses a dialogue of {', '.join(t.speaker for t in turns)}: {error}",
                where=self._tokenizer.name_or_path,
                remedy="Use a base whose chat template takes these roles in this order.",
            ) from None
        assert isinstance(text, str)
        return text

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Turns as the template wants them; those of vision models want content in parts."""
        return [
            {
                "role": MESSAGE_ROLES[turn.speaker],
                "content": [{"type": "text", "text": turn.text}] if self._in_parts else turn.text,
            }
            for turn in turns
        ]

    def check_written(self, turns: Sequence[Turn]) -> None:
        """Refuse a template that says nothing of what someone says: some write no message of a tool.

        Raises:
            UserError: the words of one of these turns are not in the prompt.
        """
        missing = self._unwritten(turns, self.prompt(turns))
        if missing is not None:
            raise self._left_out(missing)

    def _unwritten(self, turns: Sequence[Turn], text: str) -> Turn | None:
        return next((turn for turn in turns if turn.text not in text), None)

    def _wants_parts(self) -> bool:
        """Whether contents are to be lists of parts: as a string the template refuses them, or leaves them out."""
        refused = None
        missing: Turn | None = ASKED[0]
        for self._in_parts in (False, True):
            try:
                missing = self._unwritten(ASKED, self._render(ASKED))
            except UserError as error:
                refused = refused or error
                continue
            if missing is None:
                return self._in_parts
        assert missing is not None
        raise refused or self._left_out(missing)

    def _left_out(self, turn: Turn) -> UserError:
        """That the template does not write what someone says."""
        return UserError(
            f"the chat template leaves out what {turn.speaker} says (its role {MESSAGE_ROLES[turn.speaker]!r})",
            where=self._tokenizer.name_or_path,
            remedy="Use a base whose chat template writes this role, or give these turns another one in the data.",
        )

    def _find_end(self) -> tuple[str, int]:
        """The token after the agent's last words, and how many characters come after it.

        Of several side by side it is the last that is there after an earlier completion too: Cohere's second.
        Templates such as GLM's end no completion: there it is the token that begins the next turn.
        """
        tokens = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        tokens.update(self._tokenizer.all_special_tokens)
        word = ASKED[1].text
        rest = self._render(ASKED).rpartition(word)[2]
        earlier = self._render([*ASKED, Turn("user", "and?")]).rpartition(word)[2]
        if found := _first(tokens, rest):
            at, end = found
            while (found := _first(tokens, rest, at + len(end))) and found[0] == at + len(end):
                if not earlier.startswith(rest[: found[0] + len(found[1])]):
                    break
                at, end = found
            return end, len(rest) - at - len(end)
        if (found := _first(tokens, earlier)) and not earlier[: found[0]].strip():
            self.closing = earlier[: found[0] + len(found[1])].removeprefix(rest)
            return found[1], 0
        raise UserError(
            "the chat template does not end the agent's turn with a special token",
            where=self._tokenizer.name_or_path,
            remedy="Add the end token after the assistant's content in the chat template.",
        )


def _first(tokens: set[str], text: str, start: int = 0) -> tuple[int, str] | None:
    """Where the first of these tokens is in a text, and which: the longest where several begin there."""
    found = [(at, -len(token), token) for token in tokens if (at := text.find(token, start)) >= 0]
    if not found:
        return None
    at, _, token = min(found)
    return at, token


def _squeezed(text: str) -> str:
    """A text without spaces and lines: templates trim and indent."""
    return "".join(text.split())
