"""Finds questions of test sets in a training set."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from perl.data.records import Record, Records


@dataclass(frozen=True, slots=True)
class Leak:
    """The number of distinct questions in a test set, and those that are trained on."""

    questions: int
    found: tuple[str, ...]


def find_leak(train: Records, test: Records) -> Leak:
    """Return the test questions that are also in the training set, compared by letters and digits only.

    Of a set that was published with a training and a test part, each side uses its own part.
    """
    asked = _questions(record for record in test.rows() if _is_test(record, test))
    known = _questions(
        record for record in train.rows() if not train.published_test or not _is_test(record, train)
    )
    return Leak(len(asked), tuple(text for key, text in asked.items() if key in known))


def _is_test(record: Record, records: Records) -> bool:
    return not records.published_test or record.dialogue in records.published_test


def _questions(rows: Iterable[Record]) -> dict[str, str]:
    """Return the distinct questions by their letters and digits."""
    texts = ("\n".join(turn.text for turn in record.context) for record in rows)
    return {re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold()): text for text in texts}
