"""Rated or compared answers as columns: what a reward model is judged on."""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain, islice, product

from perl.data.records import Context, Turn

PAIRS_A_CONTEXT = 16
"""So that no context outweighs the others."""


@dataclass(frozen=True)
class RatedRows:
    """The rated answers, then the better ones of pairs, then the worse; one entry an answer in every column.

    Attributes:
        sources: where the rows are from, as a name.
        labels: thumbs up, of the rated answers; where there are none, True of the better ones of pairs and
            False of the worse.
        gold: the truth about the same answers, where the source knows it.
        pairs: indices (better, worse) of what was compared.
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

    def labelled(self) -> "RatedRows":
        """The rows that have labels."""
        columns = ("contexts", "answers", "dialogues", "sources")
        cut = {name: getattr(self, name)[: len(self.labels)] for name in columns}
        return replace(self, **cut, pairs=self.pairs if self.compared else [])

    def ranked_pairs(self) -> list[tuple[int, int]]:
        """What was compared; else the good and bad answers to one context, each with each."""
        if self.pairs:
            return self.pairs
        by_context: dict[Context, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index, (context, up) in enumerate(zip(self.contexts, self.truth, strict=True)):
            by_context[context][not up].append(index)
        pairs = (islice(product(ups, downs), PAIRS_A_CONTEXT) for ups, downs in by_context.values())
        return list(chain.from_iterable(pairs))
