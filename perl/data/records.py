"""The records every source yields: demonstrations, ratings, comparisons and prompts.

A record speaks of turns, never of tokens: `perl.backbones.chat` turns turns into tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

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
    """A context and how it went on. The loss falls on the agent's turns (and `text`) of the answer.

    A whole dialogue is one demonstration: its first turns are the context, all others the answer.
    """

    context: Context
    answer: Context
    dialogue: str


@dataclass(frozen=True, slots=True)
class Rating:
    """Binary feedback on one answer: up (True) or down (False).

    Attributes:
        gold: the judgement of a source that knows the truth; training never sees it.
        probability: that the label is up, where the source has soft labels: what the loss learns. `label` is then
            it rounded, 0.5 up, and what the classes, pairs and metrics go by.
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
    """A context that ends where the policy is to answer.

    `columns` are the further fields of the row: reward functions and the judge receive them.
    """

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


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was left out: where it stands and what is wrong with it."""

    where: str
    what: str


Judge = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""Gold scores in [0, 1] of one answer for each prompt."""


@dataclass(slots=True)
class Records:
    """All that a source holds, and the rows it could not read.

    Attributes:
        judge: of a source that knows the truth.
        corpus: dialogues to train a tiny base on; none of them is a demonstration, rated or a prompt.
        published_test: the dialogues of the test part it was published with, held out instead of a share.
        notes: what the reader of a source, or of a split of it, should know about it.
    """

    demonstrations: list[Demonstration] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    judge: Judge | None = None
    corpus: list[Demonstration] = field(default_factory=list)
    published_test: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def by_kind(self) -> dict[str, Sequence[Record]]:
        """The four kinds of records by their names, empty ones too."""
        return {
            "demonstrations": self.demonstrations,
            "ratings": self.ratings,
            "comparisons": self.comparisons,
            "prompts": self.prompts,
        }

    def where(self, keep: Callable[[Record], bool]) -> "Records":
        """The records that are to be kept, with the same judge."""
        return Records(
            demonstrations=[record for record in self.demonstrations if keep(record)],
            ratings=[record for record in self.ratings if keep(record)],
            comparisons=[record for record in self.comparisons if keep(record)],
            prompts=[record for record in self.prompts if keep(record)],
            judge=self.judge,
        )
