"""Fingerprints of rows, to tell whether data have changed since a stage was trained, and in how many rows.

A row's fingerprint is 28 hexadecimal digits of BLAKE2b: 8 for its context, 8 for its answers and 12 for the whole
row. A row whose context or answers are still there was edited; otherwise it was added or removed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from perl.data.records import Comparison, Prompt, Rating, Record, Records, answers_of
from perl.system.progress import counted

_CONTEXT, _ANSWERS = slice(0, 8), slice(8, 16)


def fingerprints(records: Records) -> dict[str, list[str]]:
    """Return the fingerprint of every row, by kind, in the data's order."""
    return {kind: [_fingerprint(row) for row in rows] for kind, rows in records.by_kind().items()}


def sha256_of(sides: Iterable[Records], kinds: Iterable[str]) -> str:
    """Return the SHA-256 of the rows of these kinds, in order, including each row's side of the split."""
    found = hashlib.sha256()
    for side in sides:
        of_side = side.by_kind()
        for kind in kinds:
            found.update(f"{kind} {len(of_side[kind])}\n".encode())
            found.update("".join(_fingerprint(row) for row in of_side[kind]).encode())
    return found.hexdigest()


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Describe the changes, as in `40 rows added, 1 row edited`; empty if the rows are the same in any order."""
    gone, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
    edited = 0
    for part in (_CONTEXT, _ANSWERS):
        both = Counter(row[part] for row in gone.elements()) & Counter(row[part] for row in new.elements())
        edited += both.total()
        gone, new = _without(gone, both, part), _without(new, both, part)
    numbers = {"added": new.total(), "removed": gone.total(), "edited": edited}
    return ", ".join(f"{counted(number, 'row')} {what}" for what, number in numbers.items() if number)


def _without(rows: Counter[str], matched: Counter[str], part: slice) -> Counter[str]:
    """Return the rows without those whose context (or answers) was matched, as many of each as were."""
    left, kept = Counter(matched), Counter[str]()
    for row in rows.elements():
        if left[row[part]]:
            left[row[part]] -= 1
        else:
            kept[row] += 1
    return kept


def _fingerprint(row: Record) -> str:
    # The answers are everything after the context; labels, margins and columns count for the whole row only.
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
