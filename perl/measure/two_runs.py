"""Two reward models, or two policies, on the same rows: their difference with its 95 % interval, paired.

Both are read off the same resamples of whole dialogues, so that what is hard for both does not widen the interval.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perl.measure.bootstrap import ClusterBootstrap, Floats, Interval, Statistic, value_of
from perl.measure.metrics import accuracy, auroc, checked, pairwise_accuracy
from perl.measure.paired import Metrics, changes
from perl.measure.rated_rows import RatedRows


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of both; the interval is of the second less the first. None where there is no value."""

    metric: str
    first: float | None
    second: float | None
    interval: Interval | None

    @property
    def higher(self) -> int:
        """1 or 2: which of them the interval shows to be higher; 0: neither."""
        if self.interval is None:
            return 0
        return 2 if self.interval[0] > 0 else 1 if self.interval[1] < 0 else 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two models of a kind have on the same rows.

    Attributes:
        rows: rated answers, or prompts.
        agreement: of reward models, the share of rows that both place on the same side of 0; of models that are
            judged on pairs alone, the share of pairs that both order alike.
    """

    rows: int
    dialogues: int
    differences: list[Difference]
    agreement: float | None = None


def compare_scores(first: Sequence[float], second: Sequence[float], rows: RatedRows) -> Comparison:
    """Two reward models by their scores of the same answers.

    Args:
        first: log-odds, one an answer, as `second`.
    """
    rated, count = rows.labelled(), len(rows.labels)
    scores = [np.asarray(one, dtype=np.float64) for one in (first, second)]
    labelled = [checked(one[:count], rated.truth) for one in scores]
    found = [_difference("AUROC", rated.dialogues, [auroc(*one) for one in labelled])]
    if not rows.compared:  # the score of one answer of a pair means nothing by itself
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
    """Two policies by their metrics of the same prompts, those that both have."""
    both = [name for name in first if name in second]
    found = changes({name: first[name] for name in both}, second, dialogues)
    differences = []
    for name in both:
        interval = found[f"{name}_interval"]
        assert not isinstance(interval, float)
        means = [statistics.fmean(one[name]) for one in (first, second)]
        differences.append(Difference(metric=name, first=means[0], second=means[1], interval=interval))
    return Comparison(rows=len(dialogues), dialogues=len(set(dialogues)), differences=differences)


def _difference(metric: str, dialogues: Sequence[str], of_both: Sequence[Statistic]) -> Difference:
    first, second = of_both
    values = [value_of(one, len(dialogues)) for one in of_both]
    bootstrap = ClusterBootstrap(dialogues, seed=0)
    interval = bootstrap.estimate(lambda weights_SN: second(weights_SN) - first(weights_SN)).interval
    return Difference(metric=metric, first=values[0], second=values[1], interval=interval)


def _ordered(scores: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Of each pair, the sign of the difference of its scores."""
    better_P, worse_P = np.asarray(pairs, dtype=np.int64).T
    order_P: Floats = np.sign(scores[better_P] - scores[worse_P])
    return order_P
