"""Rated or compared completions in columns, on which a reward model is evaluated."""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain, islice, product

from perl.data.records import Context, Turn

PAIRS_A_CONTEXT = 16
"""Largest number of pairs per context, so that no context outweighs the others."""


@dataclass(frozen=True)
class RatedRows:
    """Rated completions, then the better ones of pairs, then the worse; every column has one entry per completion.

    Attributes:
        sources: name of each row's source.
        labels: thumbs up of the rated completions; without ratings, True for the better ones of pairs and False
            for the worse.
        gold: the truth about the same completions, if the source knows it.
        pairs: indices (better, worse) of compared completions.
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
        """Whether the labels say which of two completions is better, rather than how each was rated."""
        return bool(self.pairs) and len(self.labels) == len(self.answers)

    @property
    def truth(self) -> list[bool]:
        """The labels against which the model is evaluated: the gold judgement if there is one, else the labels."""
        return self.labels if self.gold is None else self.gold

    def labelled(self) -> "RatedRows":
        """Return the rows that have labels."""
        columns = ("contexts", "answers", "dialogues", "sources")
        cut = {name: getattr(self, name)[: len(self.labels)] for name in columns}
        return replace(self, **cut, pairs=self.pairs if self.compared else [])

    def ranked_pairs(self) -> list[tuple[int, int]]:
        """Return the compared pairs; without any, all pairs of a good and a bad completion of the same context."""
        if self.pairs:
            return self.pairs
        by_context: dict[Context, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index, (context, up) in enumerate(zip(self.contexts, self.truth, strict=True)):
            by_context[context][not up].append(index)
        pairs = (islice(product(ups, downs), PAIRS_A_CONTEXT) for ups, downs in by_context.values())
        return list(chain.from_iterable(pairs))
