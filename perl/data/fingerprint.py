"""Fingerprints of rows: whether data are those that a stage was trained on, and if not, how many rows changed.

A row's fingerprint is 28 hexadecimal digits: 8 of its context, 8 of its answers and 12 of the whole row, all of
BLAKE2b. A row whose context or answers are still there was edited; else it was added or removed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from perl.data.records import Comparison, Prompt, Rating, Record, Records, answers_of
from perl.system.progress import counted

_CONTEXT, _ANSWERS = slice(0, 8), slice(8, 16)


def fingerprints(records: Records) -> dict[str, list[str]]:
    """Of every row, by kind, in the data's order."""
    return {kind: [_fingerprint(row) for row in rows] for kind, rows in records.by_kind().items()}


def sha256_of(sides: Iterable[Records], kinds: Iterable[str]) -> str:
    """SHA-256 of the rows of some kinds, in order, and of the side of the split that each is on."""
    found = hashlib.sha256()
    for side in sides:
        of_side = side.by_kind()
        for kind in kinds:
            found.update(f"{kind} {len(of_side[kind])}\n".encode())
            found.update("".join(_fingerprint(row) for row in of_side[kind]).encode())
    return found.hexdigest()


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What changed, as in `40 rows added, 1 row edited`; empty if the rows are the same, in whatever order."""
    gone, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
    edited = 0
    for part in (_CONTEXT, _ANSWERS):
        both = Counter(row[part] for row in gone.elements()) & Counter(row[part] for row in new.elements())
        edited += both.total()
        gone, new = _without(gone, both, part), _without(new, both, part)
    numbers = {"added": new.total(), "removed": gone.total(), "edited": edited}
    return ", ".join(f"{counted(number, 'row')} {what}" for what, number in numbers.items() if number)


def _without(rows: Counter[str], matched: Counter[str], part: slice) -> Counter[str]:
    """The rows less as many of each context (or answers) as were matched."""
    left, kept = Counter(matched), Counter[str]()
    for row in rows.elements():
        if left[row[part]]:
            left[row[part]] -= 1
        else:
            kept[row] += 1
    return kept


def _fingerprint(row: Record) -> str:
    # The answers are all of what is written after the context; the label and the like are of the whole row.
    whole = (row.context, answers_of(row), row.dialogue, _more(row))
    return _digest(row.context, 4) + _digest(answers_of(row), 4) + _digest(whole, 6)


def _more(row: Record) -> object:
    match row:
        case Rating():
            return row.label, row.probability, row.gold
        case Comparison():
            return row.margin, row.probability
        case Prompt():
            return sorted((key, repr(value)) for key, value in row.columns.items())
    return None


def _digest(value: object, size: int) -> str:
    return hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=size).hexdigest()
