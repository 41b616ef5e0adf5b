"""What a reward model ranks: rated completions by their scores, or pairs by the difference of their two scores.

The Bradley-Terry model does not determine a constant that is added to all scores of a context. A single score of a
model of pairs is therefore meaningless, and its ranking is measured by pairwise accuracy instead of AUROC.

Axis letters: M members; N rated completions, or pairs for a model of pairs.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from perl.measure.bootstrap import Floats, Statistic
from perl.measure.metrics import Labels, auroc, share_right
from perl.measure.rated_rows import RatedRows

Metric = Literal["AUROC", "pairwise accuracy"]


def metric_of(compared: bool) -> Metric:
    """Return the metric by which a ranking of pairs, or of rated completions, is measured."""
    return "pairwise accuracy" if compared else "AUROC"


@dataclass(frozen=True)
class Ranking:
    """The ranked rows and their values.

    Attributes:
        rows: the rated completions; for pairs, the better ones.
        score_N: their scores. For pairs, this and the next two are the better one's value minus the worse one's.
        members_MN: scores of the members of an ensemble.
        length_N: length in characters.
        truth_N: 1 for good completions; 1 for all pairs.
        compared: whether these are pairs.
    """

    rows: RatedRows
    score_N: Floats
    members_MN: Floats
    length_N: Floats
    truth_N: Labels
    compared: bool

    @property
    def metric(self) -> Metric:
        """The metric of the ranking."""
        return metric_of(self.compared)

    def statistic(self, score_N: Floats, truth_N: Labels) -> Statistic:
        """Return the metric of these scores, which may be a part of the ranking's."""
        return share_right(score_N) if self.compared else auroc(score_N, truth_N)


def ranking_of(members_MN: Floats, score_N: Floats, truth_N: Labels, rows: RatedRows) -> Ranking:
    """Return the ranking by the scores of completions.

    Args:
        members_MN: scores of the members of an ensemble.
        score_N: scores of the whole model.
        truth_N: 1 for good completions.
        rows: completions with labels.
    """
    length_N = np.array([len(answer.text) for answer in rows.answers], dtype=np.float64)
    if not rows.compared:
        return Ranking(rows, score_N, members_MN, length_N, truth_N, False)
    better, worse = np.asarray(rows.pairs, dtype=np.int64).T
    columns = ("contexts", "answers", "dialogues", "sources")
    chosen = {name: [getattr(rows, name)[index] for index in better] for name in columns}
    pairs = replace(rows, **chosen, labels=[True] * len(better), gold=None, pairs=[])
    score_N, members_MN, length_N = (one[..., better] - one[..., worse] for one in (score_N, members_MN, length_N))
    return Ranking(pairs, score_N, members_MN, length_N, np.ones(len(better), dtype=np.int64), True)
