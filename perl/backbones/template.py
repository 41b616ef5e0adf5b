"""The chat template: rendering of a dialogue as text, and the location of the completion in it.

A completion follows the template's generation prompt, which a server sends and a policy continues; SFT and reward
models read the same. Most templates write a last completion after this prompt, with their own text around it
(Qwen3's empty thoughts, gpt-oss's channel), and we take it from there. Some do not: DeepSeek-R1's prompt opens
`<think>`, which the finished dialogue lacks. Then the completion is that of the data, and if it has no reasoning,
the tag is closed first.

Earlier completions are context, in whatever form the template writes them (Qwen3 drops their thoughts).
"""

import json
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
"""Template for tokenizers without a chat template. A bare newline after a block would be trimmed."""

ASKED = (Turn("user", "armadillo"), Turn("agent", "pangolin"))
"""A question and its answer, in words that occur in no template."""

_THINK_CLOSED = re.compile(r".*</\w*think\w*>", re.DOTALL)
"""A text up to the end of its reasoning."""
_THINK_OPENED = re.compile(r"<(\w*think\w*)>\s*$")


class Template:
    """A tokenizer's rendering of dialogues as text.

    Attributes:
        end: the token that ends a completion, as text.
        closing: text to add after a completion that the template does not end; usually empty.
        after: number of characters that the template writes after the end of a last completion.

    Raises:
        UserError: the template refuses a question with its answer, omits a turn's text, or writes no token between
            a completion and what follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self._in_parts = False
        self._in_parts = self._needs_parts()
        self.closing = ""
        self.end, self.after = self._find_end()

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Render a context up to the start of the agent's completion."""
        return self._render(turns, add_generation_prompt=True)

    def row(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """Return the prompt before the last turn, which is the agent's, and the completion with its end token.

        Raises:
            UserError: the template refuses these turns, or changes the agent's words.
        """
        text, rendered = turns[-1].text.strip(), self._render(turns)
        rendered = rendered[: len(rendered) - self.after] + self.closing
        # Templates refuse an empty conversation: if the agent speaks first, its text marks the start.
        prompt = self.prompt(turns[:-1]) if turns[1:] else rendered.partition(text)[0]
        completion = rendered.removeprefix(prompt)
        if not rendered.endswith(self.end) or _compact(_THINK_CLOSED.sub("", text)) not in _compact(rendered):
            remedy = "Use a base whose chat template keeps the text of the last turn."
            raise self._refusal(f"rewrites the agent's turn {text[:60]!r}", remedy)
        if rendered.startswith(prompt) and _compact(text) in _compact(completion):
            return prompt, completion
        if tag := self.opened(prompt):
            reasons = f"</{tag}>" in text
            text = text.removeprefix(f"<{tag}>").lstrip() if reasons else f"</{tag}>\n\n{text}"
        return prompt, text + self.end

    def writes_after_prompt(self) -> bool:
        """Return whether the template writes a completion without reasoning after its own prompt."""
        return self._render(ASKED).startswith(self.prompt(ASKED[:1]))

    def opened(self, prompt: str) -> str | None:
        """Return the name of the reasoning tag that a prompt ends with, if any."""
        match = _THINK_OPENED.search(prompt)
        return match[1] if match else None

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        try:
            text: Any = self._tokenizer.apply_chat_template(
                self.messages(turns), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template can raise anything
            speakers = ", ".join(turn.speaker for turn in turns)
            remedy = "Remove or correct the row, or use a base whose template accepts these roles in this order."
            begins = f" (it begins {turns[0].text[:60]!r})" if turns else ""
            raise self._refusal(f"refuses a dialogue of {speakers}: {error}{begins}", remedy) from None
        assert isinstance(text, str)
        return text

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Return turns as messages for the template; those of vision models expect content in parts."""
        texts = (turn.text for turn in turns)
        contents = ([{"type": "text", "text": text}] if self._in_parts else text for text in texts)
        roles = (MESSAGE_ROLES[turn.speaker] for turn in turns)
        return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]

    def check_written(self, turns: Sequence[Turn]) -> None:
        """Refuse a template that omits one of these turns, such as a tool's. Raises `UserError`."""
        missing = self._first_omitted(turns, self.prompt(turns))
        if missing is not None:
            raise self._omission_error(missing)

    def _first_omitted(self, turns: Sequence[Turn], text: str) -> Turn | None:
        return next((turn for turn in turns if turn.text not in text), None)

    def _needs_parts(self) -> bool:
        """Return whether contents must be lists of parts, because the template refuses or omits strings."""
        refused = None
        missing: Turn | None = ASKED[0]
        for self._in_parts in (False, True):
            try:
                missing = self._first_omitted(ASKED, self._render(ASKED))
            except UserError as error:
                refused = refused or error
                continue
            if missing is None:
                return self._in_parts
        assert missing is not None
        raise refused or self._omission_error(missing)

    def _omission_error(self, turn: Turn) -> UserError:
        what = f"omits what {turn.speaker} says (its role {MESSAGE_ROLES[turn.speaker]!r})"
        remedy = "Use a base whose chat template supports this role, or give these turns another role in the data."
        return self._refusal(what, remedy)

    def _refusal(self, what: str, remedy: str) -> UserError:
        return UserError(f"the chat template {what}", where=self._tokenizer.name_or_path, remedy=remedy)

    def _find_end(self) -> tuple[str, int]:
        """Return the token that ends a last completion, and the number of characters after it.

        Of several in a row it is the last that also follows an earlier completion (Cohere's second). If the
        template ends no completion (GLM), it is the token that begins the next turn.
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
        remedy = "Add the end token after the assistant's content in the chat template."
        raise self._refusal("does not end the agent's turn with a special token", remedy)


def _first(tokens: set[str], text: str, start: int = 0) -> tuple[int, str] | None:
    """Return position and text of the first of these tokens in a text; the longest if several begin there."""
    found = [(at, -len(token), token) for token in tokens if (at := text.find(token, start)) >= 0]
    if not found:
        return None
    at, _, token = min(found)
    return at, token


def _compact(text: str) -> str:
    """Remove all whitespace from a text, since templates trim and indent."""
    return "".join(text.split())


def scoring_template(source: str, template: Template) -> str:
    """Return the chat template `source`, modified to write a last completion as `Template.row` does."""
    prompt, _ = template.row(ASKED)
    whole = f"dialogue[: dialogue | length - {template.after}] + {json.dumps(template.closing)}"
    completed = f"{{{{ {whole} }}}}"
    if not template.writes_after_prompt():
        said = "said"
        if tag := template.opened(prompt):
            opened, closed = json.dumps(f"<{tag}>"), json.dumps(f"</{tag}>")
            said = f"(said.removeprefix({opened}).lstrip() if {closed} in said else {closed} + '\\n\\n' + said)"
        completed = (
            "{% set said = messages[-1].content | trim %}"
            "{% set messages = messages[:-1] %}{% set add_generation_prompt = true %}"
            f"{_captured('prompt', source)}"
            f"{{{{ {whole} if dialogue.startswith(prompt) else prompt + {said} + {json.dumps(template.end)} }}}}"
        )
    return (
        f"{_captured('dialogue', source)}"
        "{% if messages[-1].role == 'assistant' and not add_generation_prompt %}"
        f"{completed}{{% else %}}{{{{ dialogue }}}}{{% endif %}}"
    )


def _captured(name: str, source: str) -> str:
    newline = "\n"  # Jinja drops one after a block, and one at a template's end
    return f"{{% set {name} %}}{newline}{source.removesuffix(newline)}{{% endset %}}"
