"""Finds duplicate and near-duplicate rows, so that splits do not leak and seen rows can be counted.

Rows are compared by their words: case, white space and punctuation are ignored; digits and arithmetic signs
count. Rows with the same words are the same. Longer rows are nearly the same if their sets of word pairs have a
Jaccard overlap of 0.8 (about one word in twenty differs), both for all pairs and for the distinctive pairs alone.
A pair that many dialogues have, such as those of a system prompt, is not distinctive.

The search is exact without comparing all rows: if two sets overlap by τ, the first n - ⌈τ n⌉ + 1 members of each,
the rarest first, have one in common (Chaudhuri, Ganti & Kaushik 2006; Bayardo, Ma & Srikant 2007). For very large
texts only pairs with certain hashes are kept; their overlap estimates that of the sets (Broder 1997).
"""

import hashlib
import math
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from perl.data.records import Turn

Pairs = NDArray[np.uint64]
Numbers = NDArray[np.int64]

OVERLAP = 0.8
FEWEST_PAIRS = 12
"""Rows with fewer distinctive pairs match only if their words are the same."""
COMMON = (10, 0.01, 0.5)
"""Dialogues from which a pair counts as common: the larger of a number and a share, at most another share."""
CHARACTERS = 100_000_000
"""If there is more text, only a sample of the pairs is kept."""
_WORD = re.compile(r"-\d\w*|[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
"""Numbers with their sign, Chinese and Japanese characters, words, and single signs."""
_SIGNS = "*/%&@#"
"""Unicode punctuation that counts as words."""
_SCATTER = np.uint64(0x9E3779B97F4A7C15)
"""The constant of Knuth's multiplicative hash."""


class Rows:
    """Rows to compare with one another.

    Args:
        rows: the turns of each row; speakers are ignored.
        dialogues: the dialogue of each row.
    """

    def __init__(self, rows: Sequence[Sequence[Turn]], dialogues: Sequence[str]) -> None:
        characters = sum(len(turn.text) for row in rows for turn in row)
        words = _Words(one_in=max(1, characters // CHARACTERS))
        turns = [[words.read(turn.text) for turn in row] for row in rows]
        self.words = [b"".join(digest for digest, _ in row) for row in turns]
        """A key of each row, equal for equal words."""
        none = np.empty(0, dtype=np.uint64)
        pairs = [np.unique(np.concatenate([none, *(array for _, array in row)])) for row in turns]
        self._numbers, self._shared, self._distinctive = _numbered(pairs, self.words, dialogues)

    def clusters(self) -> list[int]:
        """Return the leader of each row's cluster, which matches all its rows; often the row itself."""
        order = sorted(range(len(self.words)), key=lambda row: (-len(self._numbers[row]), self.words[row]))
        index, leaders = _Index(self), list(range(len(self.words)))
        for row in order:
            leader = index.find(row)
            if leader is None:
                index.add(row)
            else:
                leaders[row] = leader
        return leaders

    def like(self, rows: Iterable[int], known: Iterable[int]) -> list[bool]:
        """Return whether each of these rows is the same, or nearly the same, as a known row."""
        index = _Index(self)
        for row in known:
            index.add(row)
        return [index.find(row) is not None for row in rows]

    def distinctive(self, row: int) -> Numbers:
        """Return the row's distinctive pairs, the rarest first."""
        numbers = self._numbers[row]
        return numbers[: np.searchsorted(numbers, self._distinctive)]

    def first(self, row: int) -> list[int]:
        """Return the prefix that shares a pair with every near-duplicate, without pairs that only this row has."""
        pairs = self.distinctive(row)
        if len(pairs) < FEWEST_PAIRS:
            return []
        prefix = pairs[: len(pairs) - math.ceil(OVERLAP * len(pairs)) + 1]
        return [int(pair) for pair in prefix[np.searchsorted(prefix, self._shared) :]]

    def nearly(self, one: int, other: int) -> bool:
        """Return whether two rows overlap, in all pairs and in the distinctive ones."""
        return _overlap(self.distinctive(one), self.distinctive(other)) and _overlap(
            self._numbers[one], self._numbers[other]
        )


class _Index:
    """Index of rows by their words and by their rarest pairs."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._added: dict[bytes, int] = {}
        self._places: dict[int, list[int]] = defaultdict(list)
        self._order: list[int] = []

    def add(self, row: int) -> None:
        """Add a row, unless there is one with the same words."""
        if self._added.setdefault(self._rows.words[row], row) == row:
            for pair in self._rows.first(row):
                self._places[pair].append(len(self._order))
            self._order.append(row)

    def find(self, row: int) -> int | None:
        """Return the row with the same words, else the first added row that is nearly the same, if any."""
        same = self._added.get(self._rows.words[row])
        if same is not None:
            return same
        places = {place for pair in self._rows.first(row) for place in self._places.get(pair, ())}
        near = (self._order[place] for place in sorted(places))
        return next((other for other in near if self._rows.nearly(row, other)), None)


class _Words:
    """Turns as words; each text is read once, because the contexts of a dialogue are prefixes of one another."""

    def __init__(self, one_in: int) -> None:
        self._one_in = np.uint64(one_in)
        self.read = cache(self._read)

    def _read(self, text: str) -> tuple[bytes, Pairs]:
        """Return a digest of the words, and their pairs of neighbours or a sample of these."""
        numbers = [_number(word) for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold())]
        words = np.array([number for number in numbers if number is not None], dtype=np.uint64)
        pairs = words[:-1] << np.uint64(32) | words[1:]
        if self._one_in > 1:
            pairs = pairs[(pairs * _SCATTER >> np.uint64(32)) % self._one_in == 0]
        return hashlib.blake2b(words.tobytes(), digest_size=16).digest() if len(words) else b"", pairs


@cache
def _number(word: str) -> int | None:
    """Return a hash of the word; None for punctuation."""
    if unicodedata.category(word[0]).startswith("P") and len(word) == 1 and word not in _SIGNS:
        return None
    return zlib.crc32(word.encode())


def _numbered(
    pairs: Sequence[Pairs], words: Sequence[bytes], dialogues: Sequence[str]
) -> tuple[list[Numbers], int, int]:
    """Return each row's pairs as sorted numbers, which increase with the number of dialogues that have the pair.

    Returns:
        The rows, the first number of a pair in two or more dialogues, and the first number of a pair that is not
        distinctive.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, dialogue in enumerate(dialogues):
        rows_of[dialogue].append(row)
    # Copies of a dialogue with other names count once.
    different = {frozenset(words[row] for row in rows): rows for rows in rows_of.values()}.values()
    each = [np.unique(np.concatenate([pairs[row] for row in rows])) for rows in different]
    known, counts = np.unique(np.concatenate(each), return_counts=True)
    order = np.argsort(counts, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    few, share, most = COMMON
    common = min(max(few, share * len(each)), most * len(each))
    shared, distinctive = np.searchsorted(counts[order], (1, common), side="right")
    return [np.sort(number[np.searchsorted(known, row)]) for row in pairs], int(shared), int(distinctive)


def _overlap(one: Numbers, other: Numbers) -> bool:
    fewer, more = sorted((len(one), len(other)))
    if fewer < OVERLAP * more:
        return False
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both >= OVERLAP * (fewer + more - both)
