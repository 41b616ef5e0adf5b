"""Splits records by dialogue.

Contexts of one dialogue are prefixes of one another, so rows split at random would be held out in name only.
A source that was published with a test part has that part held out, so that figures can be compared.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from perl.data.records import Comparison, Demonstration, Prompt, Rating, Records
from perl.errors import UserError

Record = Demonstration | Rating | Comparison | Prompt
_R = TypeVar("_R", Demonstration, Rating, Comparison, Prompt)

_REMEDY = "Use more data, another seed, or a data.held_out nearer to 0.5."


def split(records: Records, held_out: float, seed: int) -> tuple[Records, Records]:
    """Splits into what is trained on and what is held out; no dialogue is on both sides, in any kind.

    The same keys, share and seed always give the same split. The judge goes to both sides, the problems and
    the corpus to the first.

    Args:
        records: what a source holds.
        held_out: the share of dialogues to hold out, above 0 and below 1; at least one is. Not read where the
            source has a published test part.
        seed: picks which.

    Raises:
        UserError: the share is out of range, there is only one dialogue, or a side lacks a kind of record or
            a class of rating that the whole has.
    """
    if not 0 < held_out < 1:
        raise UserError(f"{held_out} is not a share", where="data.held_out", remedy="Set it above 0 and below 1.")
    dialogues = {record.dialogue for record in _all(records)}
    if len(dialogues) < 2:
        remedy = "Use more data, or give each row's conversation its own `dialogue`."
        raise UserError(f"{len(dialogues)} dialogue cannot be split", where="data.held_out", remedy=remedy)
    chosen = set(records.published_test) or _drawn(dialogues, held_out, seed)
    train, held = _side(records, dialogues - chosen), _side(records, chosen)
    for name, side in (("training", train), ("held-out", held)):
        _check(name, side, records)
    train.problems, train.corpus = records.problems, records.corpus
    return train, held


def _drawn(dialogues: set[str], share: float, seed: int) -> set[str]:
    """A share of the dialogues."""
    # Ordered by a hash, not shuffled: a few more rows in the data leave most dialogues on their side.
    order = sorted(dialogues, key=lambda dialogue: hashlib.sha256(f"{seed}:{dialogue}".encode()).digest())
    return set(order[: min(max(round(share * len(order)), 1), len(order) - 1)])


def _all(records: Records) -> Iterator[Record]:
    yield from records.demonstrations
    yield from records.ratings
    yield from records.comparisons
    yield from records.prompts


def _side(records: Records, dialogues: set[str]) -> Records:
    def of_side(kind: Sequence[_R]) -> list[_R]:
        return [record for record in kind if record.dialogue in dialogues]

    return Records(
        demonstrations=of_side(records.demonstrations),
        ratings=of_side(records.ratings),
        comparisons=of_side(records.comparisons),
        prompts=of_side(records.prompts),
        judge=records.judge,
    )


def _check(name: str, side: Records, whole: Records) -> None:
    for kind, have in _counts(whole).items():
        if have and not _counts(side)[kind]:
            what = f"the {name} part has no {kind}, of {have} in all"
            raise UserError(what, where="data.held_out", remedy=_REMEDY)


def _counts(records: Records) -> dict[str, int]:
    up = sum(rating.label for rating in records.ratings)
    return {
        "demonstrations": len(records.demonstrations),
        "thumbs up": up,
        "thumbs down": len(records.ratings) - up,
        "comparisons": len(records.comparisons),
        "prompts": len(records.prompts),
    }
