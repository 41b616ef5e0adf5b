"""The completions that `perl.library` returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """A sampled completion.

    Attributes:
        text: the completion without its end token.
        ended: whether the role ended it; otherwise it was cut off at `max_new_tokens`.
        tokens: number of tokens sampled, including the end token.
        prompt_tokens: number of tokens of the prompt, after cutting it to the base's context.
    """

    text: str
    ended: bool
    tokens: int
    prompt_tokens: int
