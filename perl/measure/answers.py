"""Answers that people rated or compared, as columns: what a reward model is judged on."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

from perl.data.records import Context, Turn

PAIRS_A_CONTEXT = 16
"""So that no context outweighs the others."""


@dataclass(frozen=True)
class Answers:
    """The rated answers, then the better ones of pairs, then the worse; one entry an answer in every column.

    Attributes:
        sources: where the rows are from, as a name.
        labels: thumbs up, of the rated answers; where there are none, True of the better ones of pairs and
            False of the worse.
        gold: the truth about the same answers, where the source knows it.
        pairs: places (better, worse) of what was compared.
    """

    contexts: list[Context]
    answers: list[Turn]
    dialogues: list[str]
    sources: list[str]
    labels: list[bool]
    gold: list[bool] | None
    pairs: list[tuple[int, int]]

    @property
    def compared(self) -> bool:
        """Whether the labels say which of two answers is the better, and not what an answer was rated."""
        return bool(self.pairs) and len(self.labels) == len(self.answers)

    @property
    def truth(self) -> list[bool]:
        """What the model is judged against: the gold judgement where there is one, else the labels."""
        return self.labels if self.gold is None else self.gold

    def labelled(self) -> "Answers":
        """The answers that have labels."""
        count = len(self.labels)
        return Answers(
            contexts=self.contexts[:count],
            answers=self.answers[:count],
            dialogues=self.dialogues[:count],
            sources=self.sources[:count],
            labels=self.labels,
            gold=self.gold,
            pairs=self.pairs if self.compared else [],
        )

    def ranked_pairs(self) -> list[tuple[int, int]]:
        """What was compared; else the good and bad answers to one context, each with each."""
        return self.pairs or _within_contexts(self.contexts, self.truth)


def _within_contexts(contexts: Sequence[Context], truth: Sequence[bool]) -> list[tuple[int, int]]:
    """Places (up, down) of answers to the same context."""
    sides: dict[Context, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, (context, up) in enumerate(zip(contexts, truth, strict=True)):
        sides[context][not up].append(index)
    return [pair for ups, downs in sides.values() for pair in islice(product(ups, downs), PAIRS_A_CONTEXT)]
