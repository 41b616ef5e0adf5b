"""Comparison of two reward models, or two policies, on the same rows, with paired 95 % intervals.

Both are measured on the same resamples of whole dialogues, so that rows that are hard for both do not widen the
interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perl.measure.bootstrap import ClusterBootstrap, Floats, Interval, Statistic, value_of
from perl.measure.metrics import accuracy, auroc, checked, pairwise_accuracy
from perl.measure.paired import Metrics, changes
from perl.measure.rated_rows import RatedRows


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of both, and the interval of the second minus the first. None if undefined."""

    metric: str
    first: float | None
    second: float | None
    interval: Interval | None

    @property
    def higher(self) -> int:
        """1 or 2, the one that the interval shows to be higher; 0 if neither."""
        if self.interval is None:
            return 0
        return 2 if self.interval[0] > 0 else 1 if self.interval[1] < 0 else 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The metrics of two models of the same kind on the same rows.

    Attributes:
        rows: number of rated completions or prompts.
        agreement: for reward models, the share of rows that both place on the same side of 0; if only pairs are
            evaluated, the share of pairs that both order in the same way.
    """

    rows: int
    dialogues: int
    differences: list[Difference]
    agreement: float | None = None


def compare_scores(first: Sequence[float], second: Sequence[float], rows: RatedRows) -> Comparison:
    """Compare two reward models by their scores of the same completions.

    Args:
        first: log-odds, one per completion, like `second`.
    """
    rated, count = rows.labelled(), len(rows.labels)
    scores = [np.asarray(one, dtype=np.float64) for one in (first, second)]
    labelled = [checked(one[:count], rated.truth) for one in scores]
    found = []
    if not rows.compared:  # the score of one completion of a pair is meaningless by itself
        found.append(_difference("AUROC", rated.dialogues, [auroc(*one) for one in labelled]))
        found.append(_difference("accuracy", rated.dialogues, [accuracy(*one) for one in labelled]))
    pairs = rows.ranked_pairs()
    if pairs:
        of_both = [pairwise_accuracy(one, pairs) for one in scores]
        found.append(_difference("pairwise accuracy", rows.dialogues, of_both))
    sides = [_ordered(one, pairs) if rows.compared else one[:count] > 0 for one in scores]
    return Comparison(
        rows=len(rows.answers),
        dialogues=len(set(rows.dialogues)),
        differences=found,
        agreement=float((sides[0] == sides[1]).mean()),
    )


def compare_metrics(first: Metrics, second: Metrics, dialogues: Sequence[str]) -> Comparison:
    """Compare two policies by those metrics of the same prompts that both have."""
    both = {name: values for name, values in first.items() if name in second}
    differences = [
        Difference(metric=name, first=one.before, second=one.after, interval=one.interval)
        for name, one in changes(both, second, dialogues).items()
    ]
    return Comparison(rows=len(dialogues), dialogues=len(set(dialogues)), differences=differences)


def _difference(metric: str, dialogues: Sequence[str], of_both: Sequence[Statistic]) -> Difference:
    first, second = of_both
    values = [value_of(one, len(dialogues)) for one in of_both]
    bootstrap = ClusterBootstrap(dialogues, seed=0)
    interval = bootstrap.estimate(lambda weights_SN: second(weights_SN) - first(weights_SN)).interval
    return Difference(metric=metric, first=values[0], second=values[1], interval=interval)


def _ordered(scores: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Return the sign of each pair's difference of scores."""
    better_P, worse_P = np.asarray(pairs, dtype=np.int64).T
    order_P: Floats = np.sign(scores[better_P] - scores[worse_P])
    return order_P
