"""Questions of test sets that a training set holds too."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from perl.data.records import Record, Records


@dataclass(frozen=True, slots=True)
class Leak:
    """Of so many distinct questions of a test set, how many and which are trained on."""

    questions: int
    found: tuple[str, ...]


def find_leak(train: Records, test: Records) -> Leak:
    """The test set's questions that are among the training set's, by their letters and digits alone.

    Of a set that was published in two parts each side takes its own part.
    """
    asked = _questions(record for record in test.rows() if _is_test(record, test))
    known = _questions(
        record for record in train.rows() if not train.published_test or not _is_test(record, train)
    )
    return Leak(len(asked), tuple(text for key, text in asked.items() if key in known))


def _is_test(record: Record, records: Records) -> bool:
    return not records.published_test or record.dialogue in records.published_test


def _questions(rows: Iterable[Record]) -> dict[str, str]:
    """Distinct questions: their letters and digits, and as they stand."""
    texts = ("\n".join(turn.text for turn in record.context) for record in rows)
    return {re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold()): text for text in texts}
