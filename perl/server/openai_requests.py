"""Requests of OpenAI's API. Unsupported fields are refused, unless their value has no effect."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from perl.completion import Completion
from perl.data.jsonl import parse_row
from perl.data.records import Context, Rating, Record, Turn
from perl.data.rows import RowError
from perl.errors import UserError

MAX_ROWS = 64
"""Largest number of completions or scores per request."""
WHERE = "the request"


@dataclass(frozen=True)
class Generation:
    """How to generate; None: as in the run's recipe."""

    max_tokens: int | None
    temperature: float | None
    n: int
    seed: int
    stop: tuple[str, ...]

    def stops(self, text: str) -> bool:
        """Return whether a text contains a stop sequence."""
        return any(one in text for one in self.stop)

    def cut(self, completion: Completion) -> tuple[str, str]:
        """Return the text before the first stop sequence, and OpenAI's `finish_reason`."""
        ends = [place for one in self.stop if (place := completion.text.find(one)) >= 0]
        if ends:
            return completion.text[: min(ends)], "stop"
        return completion.text, "stop" if completion.ended else "length"

    def settled(self, completion: Completion) -> str:
        """Return the part of an unfinished text that is final: without partial characters or stop sequences."""
        text, _ = self.cut(completion)
        held_back = max(map(len, self.stop), default=1) - 1
        return text[: max(0, len(text) - held_back)].rstrip("\ufffd")


@dataclass(frozen=True)
class TextFormat:
    """The only supported `response_format`."""

    type: Literal["text"]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Fields of both endpoints; from `top_p` on, only values without effect are accepted."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    top_p: Annotated[float, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Literal[""] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    def generation(self) -> Generation:
        """Return the settings."""
        return Generation(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            n=self.n or 1,
            seed=self.seed if self.seed is not None else secrets.randbits(31),
            stop=tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or [])),
        )


@dataclass(frozen=True, kw_only=True)
class ChatRequest(_Request):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def contexts(self) -> list[Context]:
        """Return the conversation. Raises `UserError`."""
        return [_context(self.messages)]

    def generation(self) -> Generation:
        """Return the settings."""
        asked = super().generation()
        return (
            asked if self.max_completion_tokens is None else replace(asked, max_tokens=self.max_completion_tokens)
        )


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(_Request):
    """A request to /v1/completions."""

    prompt: str | list[str]

    def contexts(self) -> list[Context]:
        """Return the texts. Raises `UserError`."""
        return [_context(one) for one in ([self.prompt] if isinstance(self.prompt, str) else self.prompt)]


@dataclass(frozen=True)
class ScoreRequest:
    """A request to /score, as in vLLM: one prompt with several answers, or as many prompts as answers.

    Attributes:
        text_1: prompts: plain texts, or the chat messages of a single prompt.
        text_2: their answers.
    """

    model: str
    text_1: str | list[str] | list[dict[str, Any]]
    text_2: str | list[str]

    def answered(self) -> list[tuple[Context, Turn]]:
        """Return each prompt with its answer. Raises `UserError`."""
        is_chat = isinstance(self.text_1, list) and any(isinstance(one, dict) for one in self.text_1)
        prompts: Sequence[Any] = [self.text_1] if is_chat or isinstance(self.text_1, str) else self.text_1
        answers = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        prompts = list(prompts) * len(answers) if len(prompts) == 1 else prompts
        if len(prompts) != len(answers) or not 0 < len(answers) <= MAX_ROWS:
            what = f"text_1 has {len(prompts)} prompts, text_2 {len(answers)} answers"
            remedy = f"Give one prompt, or one per answer; at most {MAX_ROWS}."
            raise UserError(what, where=WHERE, remedy=remedy)
        return [_answered(*pair) for pair in zip(prompts, answers, strict=True)]


def _answered(prompt: object, answer: str) -> tuple[Context, Turn]:
    record = _record({"prompt": prompt, "completion": answer, "label": True})
    assert isinstance(record, Rating)
    return record.context, record.answer


def _context(prompt: object) -> Context:
    return _record({"prompt": prompt}).context


def _record(row: Mapping[str, object]) -> Record:
    try:
        return parse_row(row)[0]
    except RowError as error:
        raise UserError(str(error), where=WHERE, remedy="Correct this field.") from None
