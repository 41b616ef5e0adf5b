"""Completions side by side: what RL changed, word by word, and whether it is better."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perl.report.numbers import joined
from perl.results import Completion, Sample, Turn

Outcome = Literal["better", "worse", "alike", "same"]
"""Compares completions after and before RL: `alike` differs only in wording, `same` not at all."""
OUTCOMES: dict[Outcome, str] = {
    "better": "better",
    "worse": "worse",
    "alike": "changed, judged equal",
    "same": "unchanged",
}
ROLES = {"base": "Base", "sft": "After SFT", "policy": "After RL"}
SHOWN_TURNS = 3
"""Number of last turns shown; earlier ones are collapsed."""
LEAST_IN_COMMON = 0.3
"""If two texts share a smaller part of their words, they differ as a whole, and no word is marked."""


@dataclass(frozen=True)
class Piece:
    """Some words of a completion, and whether only this completion has them."""

    text: str
    marked: bool


@dataclass(frozen=True)
class Shown:
    """A role's completion of a prompt, in pieces."""

    label: str
    pieces: list[Piece]
    completion: Completion


@dataclass(frozen=True)
class Example:
    """A prompt with its completions in the order of training; no outcome if there is only one policy."""

    earlier: list[Turn]
    turns: list[Turn]
    completions: list[Shown]
    outcome: Outcome | None

    @property
    def label(self) -> str:
        """The outcome in words; empty without one."""
        return OUTCOMES[self.outcome] if self.outcome else ""


@dataclass(frozen=True)
class Examples:
    """The changed and the unchanged examples, in the order of the file, and their numbers in a sentence."""

    changed: list[Example]
    same: list[Example]
    words: str


def examples(samples: Sequence[Sample]) -> Examples:
    """Return the completions of a run's prompts, for its page."""
    every = [_example(sample) for sample in samples]
    counts = Counter(one.outcome for one in every if one.outcome)
    if not counts:
        return Examples(every, [], "")
    said = joined([f"{counts[outcome]} {label}" for outcome, label in OUTCOMES.items() if counts[outcome]])
    judged = "by the gold judge" if any(_gold(sample) for sample in samples) else "by the reward that RL raised"
    same = [one for one in every if one.outcome == "same"]
    changed = [one for one in every if one.outcome != "same"]
    return Examples(changed, same, f"After RL compared with before, {judged}: {said}.")


def during_training(samples: Sequence[Sample]) -> list[Example]:
    """Return the prompts that were completed at intervals during RL, each with its completions by step."""
    shown: dict[str, Example] = {}
    for sample in samples:
        one = shown.setdefault(repr(sample.prompt), Example(*_turns(sample), completions=[], outcome=None))
        for completion in sample.answers.values():
            pieces = [Piece(completion.text, marked=False)]
            one.completions.append(Shown(f"Step {sample.step}", pieces, completion))
    return list(shown.values())


def _turns(sample: Sample) -> tuple[list[Turn], list[Turn]]:
    """Return the earlier turns, and the last ones."""
    turns = [Turn(role="prompt", content=sample.prompt)] if isinstance(sample.prompt, str) else sample.prompt
    cut = max(0, len(turns) - SHOWN_TURNS)
    return turns[:cut], turns[cut:]


def _example(sample: Sample) -> Example:
    order = [*(role for role in ROLES if role in sample.answers), *sorted(set(sample.answers) - set(ROLES))]
    pieces = {role: [Piece(sample.answers[role].text, marked=False)] for role in order}
    before = next((role for role in ("sft", "base") if role in sample.answers), None)
    outcome: Outcome | None = None
    if before and "policy" in sample.answers:
        old, new = sample.answers[before], sample.answers["policy"]
        outcome = _outcome(old, new)
        pieces[before], pieces["policy"] = _compared(old.text, new.text)
    shown = [Shown(ROLES.get(role, role), pieces[role], sample.answers[role]) for role in order]
    return Example(*_turns(sample), shown, outcome)


def _gold(sample: Sample) -> bool:
    return any(answer.gold is not None for answer in sample.answers.values())


def _outcome(old: Completion, new: Completion) -> Outcome:
    """Return the outcome by the gold judge if there is one, else by the reward."""
    if old.text == new.text:
        return "same"
    judged = old.gold is not None and new.gold is not None
    was, became = (old.gold or 0.0, new.gold or 0.0) if judged else (old.reward, new.reward)
    return "better" if became > was else "worse" if became < was else "alike"


def _compared(old: str, new: str) -> tuple[list[Piece], list[Piece]]:
    """Split both texts into pieces and mark what the other lacks, unless they have hardly a word in common."""
    words = [re.findall(r"\S+\s*|\s+", text) for text in (old, new)]
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    if matcher.ratio() < LEAST_IN_COMMON:
        return [Piece(old, marked=False)], [Piece(new, marked=False)]
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, start, end, new_start, new_end in matcher.get_opcodes():
        for side, part in zip(sides, (words[0][start:end], words[1][new_start:new_end]), strict=True):
            if part:
                side.append(Piece("".join(part), marked=tag != "equal"))
    return sides
