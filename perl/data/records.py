"""The records that every source yields: demonstrations, ratings, comparisons and prompts.

Records consist of turns, never of tokens: `perl.backbones.chat` tokenizes turns.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeAlias

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

Speaker = Literal["system", "user", "agent", "api", "text"]
"""The speaker of a turn. `text` is plain text outside any chat format, which is not changed."""

CALL = "call "
"""Beginning of an agent turn that is an API call: `call NAME {"argument": "value"}`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue."""

    speaker: Speaker
    text: str

    @property
    def is_call(self) -> bool:
        """Whether this is an API call by the agent."""
        return self.speaker == "agent" and self.text.startswith(CALL)


Context = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A context and all turns after it, such as a whole dialogue; agent turns (and `text`) are trained on."""

    context: Context
    answer: Context
    dialogue: str


@dataclass(frozen=True, slots=True)
class Rating:
    """Binary feedback on one answer: up (True) or down (False).

    Attributes:
        gold: the verdict of a source that knows the truth; training never sees it.
        probability: the probability of an up label, if the source has soft labels: the loss's target. `label`,
            which classes, pairs and metrics use, is then true from 0.5.
    """

    context: Context
    answer: Turn
    label: bool
    dialogue: str
    gold: bool | None = None
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one context, of which the first was preferred.

    Attributes:
        margin: by how much the better answer's score should be higher, at least 0.
        probability: the probability that `better` is the better answer, from 0.5 to 1.
    """

    context: Context
    better: Turn
    worse: Turn
    dialogue: str
    margin: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A context to complete; `columns` are the row's other fields, for reward functions and the judge."""

    context: Context
    dialogue: str
    columns: Mapping[str, JSON] = field(default_factory=dict)


Record = Demonstration | Rating | Comparison | Prompt


def answers_of(record: Record) -> list[Context]:
    """Return what follows the context in a record: two answers in a comparison, none in a prompt."""
    match record:
        case Demonstration():
            return [record.answer]
        case Rating():
            return [(record.answer,)]
        case Comparison():
            return [(record.better,), (record.worse,)]
        case Prompt():
            return []


def content_of(record: Record) -> Hashable:
    """Return a key of a record's content without its dialogue; ratings with different labels differ."""
    label = record.label if isinstance(record, Rating) else None
    columns = json.dumps(record.columns, sort_keys=True) if isinstance(record, Prompt) else None
    return (record.context, *answers_of(record), label, columns)


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was left out: its place and what is wrong with it."""

    where: str
    what: str


Judge = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""Returns gold scores in [0, 1] for one answer to each prompt."""


@dataclass(slots=True)
class Records:
    """All records of a source, and the rows that could not be read.

    Attributes:
        corpus: returns dialogues to train a tiny base on, which are in no other record; most runs need none.
        published_test: the dialogues of the published test part, which is held out instead of a share.
        fingerprints: fingerprints of all rows by kind, before the split (`perl.data.fingerprint`).
        notes: messages for the user about the source or the split.
        incomplete: for held-out records, whether a kind or class is missing, or is also in the training records.
    """

    demonstrations: list[Demonstration] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    judge: Judge | None = None
    corpus: Callable[[], list[Demonstration]] | None = None
    published_test: frozenset[str] = frozenset()
    fingerprints: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    incomplete: bool = False

    def by_kind(self) -> dict[str, Sequence[Record]]:
        """Return the four kinds of records by name, including empty ones."""
        return {kind: getattr(self, kind) for kind in ("demonstrations", "ratings", "comparisons", "prompts")}

    def rows(self) -> Iterator[Record]:
        """Iterate over all records, one kind after another."""
        return chain.from_iterable(self.by_kind().values())

    def where(self, keep: Callable[[Record], bool]) -> "Records":
        """Return the records to keep, with the same judge."""
        kept: dict[str, Any] = {kind: list(filter(keep, rows)) for kind, rows in self.by_kind().items()}
        return Records(**kept, judge=self.judge)
