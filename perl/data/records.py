"""The records every source yields: demonstrations, ratings, comparisons and prompts.

A record speaks of turns, never of tokens: `perl.backbones.chat` turns turns into tokens.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeAlias

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

Speaker = Literal["system", "user", "agent", "api", "text"]
"""Who says a turn. `text` is plain text outside any chat format, rendered as it stands."""

CALL = "call "
"""An agent turn that begins so is an API call: `call NAME {"argument": "value"}`."""


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
    """A context and all turns after it, such as a whole dialogue; the agent's (and `text`) are trained on."""

    context: Context
    answer: Context
    dialogue: str


@dataclass(frozen=True, slots=True)
class Rating:
    """Binary feedback on one answer: up (True) or down (False).

    Attributes:
        gold: the judgement of a source that knows the truth; training never sees it.
        probability: that the label is up, where the source has soft labels: the target of the loss. `label`, which
            classes, pairs and metrics go by, is then true from 0.5.
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
        margin: by how much the better one's score should be higher, at least 0.
        probability: that `better` is the better, from 0.5 to 1.
    """

    context: Context
    better: Turn
    worse: Turn
    dialogue: str
    margin: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A context to complete; `columns` are the row's further fields, for reward functions and the judge."""

    context: Context
    dialogue: str
    columns: Mapping[str, JSON] = field(default_factory=dict)


Record = Demonstration | Rating | Comparison | Prompt


def answers_of(record: Record) -> list[Context]:
    """What follows the context in a record: two answers in a comparison, none in a prompt."""
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
    """What two rows that say the same share, whatever the dialogue; ratings with different labels do not."""
    label = record.label if isinstance(record, Rating) else None
    columns = json.dumps(record.columns, sort_keys=True) if isinstance(record, Prompt) else None
    return (record.context, *answers_of(record), label, columns)


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was left out: where it stands and what is wrong with it."""

    where: str
    what: str


Judge = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""Gold scores in [0, 1] of one answer to each prompt."""


@dataclass(slots=True)
class Records:
    """All that a source holds, and the rows it could not read.

    Attributes:
        corpus: dialogues to train a tiny base on, which are in no other record.
        published_test: the dialogues of the published test part, which is held out instead of a share.
        fingerprints: of all rows by kind, before they were split (`perl.data.fingerprint`).
        notes: what a user should know of the source or the split.
        incomplete: of held-out records, whether a kind or a class is missing, or only there as in training.
    """

    demonstrations: list[Demonstration] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    judge: Judge | None = None
    corpus: list[Demonstration] = field(default_factory=list)
    published_test: frozenset[str] = frozenset()
    fingerprints: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    incomplete: bool = False

    def by_kind(self) -> dict[str, Sequence[Record]]:
        """The four kinds of records by their names, empty ones too."""
        return {kind: getattr(self, kind) for kind in ("demonstrations", "ratings", "comparisons", "prompts")}

    def rows(self) -> Iterator[Record]:
        """All records, a kind after another."""
        return chain.from_iterable(self.by_kind().values())

    def where(self, keep: Callable[[Record], bool]) -> "Records":
        """The records to keep, with the same judge."""
        kept: dict[str, Any] = {kind: list(filter(keep, rows)) for kind, rows in self.by_kind().items()}
        return Records(**kept, judge=self.judge)
