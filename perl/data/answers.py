"""Extracts the answer from a text and compares it with the reference: numbers, letters and LaTeX.

Numbers and letters follow `evaluate.py` of LLM-Adapters (Hu et al. 2023): the last number after removing commas,
correct within 0.001; for choices, the first of the letters A to E.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

from perl.data.records import JSON, Prompt
from perl.errors import UserError

AnswerKind = Literal["number", "letter", "latex"]

TOLERANCE = 0.001
_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile("[A-E]")


def last_number(text: str) -> float | None:
    """Return the last number of a text, commas removed; None without one."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def first_letter(text: str) -> str | None:
    """Return the first of the letters A to E, at any position; None without one."""
    found = _LETTER.search(text)
    return found[0] if found else None


def is_right(kind: AnswerKind, text: str, reference: JSON) -> bool:
    """Return whether the answer in a text is the reference answer.

    Raises:
        UserError: the reference has a `reference_problem`, or the package for LaTeX is missing.
    """
    if problem := reference_problem(kind, reference):
        raise UserError(problem, where=f"reference answer {reference!r}", remedy="Correct the row.")
    return _RULES[kind](text, str(reference))


def reference_problem(kind: AnswerKind, reference: JSON) -> str | None:
    """Return why a value cannot be a reference answer of this kind; None if it can."""
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        return "is neither text nor a number"
    text = str(reference).replace(",", "").strip()
    if kind == "letter":
        return None if _LETTER.fullmatch(text) else "is not one of the letters A to E"
    if kind == "number":
        try:
            return None if math.isfinite(float(text)) else "is not finite"
        except ValueError:
            return "is not a number"
    return None if text else "is empty"


def check_references(kind: AnswerKind, column: str, prompts: Sequence[Prompt], where: str) -> None:
    """Refuse prompts whose reference answer is missing or of another kind.

    Raises:
        UserError: names the first such prompt.
    """
    for prompt in prompts:
        problem = reference_problem(kind, prompt.columns.get(column))
        if problem:
            value = (
                f"its column {column!r} {problem}" if column in prompt.columns else f"it has no column {column!r}"
            )
            raise UserError(
                f"a prompt has no reference answer of kind {kind}: {value}",
                where=f"{where}, prompt of dialogue {prompt.dialogue[:60]!r}",
                remedy="Add a field with the answer to every row, and name the field in `column`.",
            )


def _same_number(text: str, reference: str) -> bool:
    number = last_number(text)
    return number is not None and abs(number - float(reference.replace(",", ""))) <= TOLERANCE


def _same_letter(text: str, reference: str) -> bool:
    return first_letter(text) == reference.replace(",", "").strip()


def _same_latex(text: str, reference: str) -> bool:
    """Compare with the package math-verify, whose time limit is 5 seconds; after that an answer is wrong."""
    try:
        from math_verify import parse, verify
    except ImportError:
        remedy = "Run `pip install 'perl-rlhf[rules]'`."
        raise UserError(
            "answers in LaTeX need the package math-verify", where="rl.reward", remedy=remedy
        ) from None
    dollars = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    gold, answer = parse(dollars), parse(text)
    return bool(verify(gold, answer))


_RULES: dict[AnswerKind, Callable[[str, str], bool]] = {
    "number": _same_number,
    "letter": _same_letter,
    "latex": _same_latex,
}
