"""Ensembles of reward models: their score, their disagreement, and the value of both.

An ensemble's mean is closer to the truth than its members, and more likely to be wrong where they disagree (Coste
et al. 2023, arXiv 2310.02743; Eisenstein et al. 2023, arXiv 2312.09244).

Axis letters: M members, S resamples, N answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perl.measure.bootstrap import ClusterBootstrap, Floats, Interval
from perl.measure.change import told
from perl.measure.metrics import Labels, auroc, equal_mass, probabilities
from perl.measure.ranking import Metric, Ranking

Combine = Literal["mean", "mean_minus_std", "min"]
"""How the members' rewards are combined into RL's reward."""
DISAGREEMENT_BINS = 4


@dataclass(frozen=True, kw_only=True)
class DisagreementBin:
    """Completions with similar disagreement: the mean disagreement, the share scored wrongly, and their number."""

    disagreement: float
    error: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """An ensemble compared with its members, on the completions or pairs of its card.

    Attributes:
        auroc: the AUROC of each member; for pairs, the pairwise accuracy.
        ahead: the ensemble's value minus the mean of its members'.
        by_disagreement: bins of equal size; a score is wrong if it is on the other side of 0 than the truth.
        auroc_of_disagreement: how often a wrong score has more disagreement than a right one.
    """

    auroc: list[float | None]
    ahead: float | None
    ahead_interval: Interval | None
    by_disagreement: list[DisagreementBin]
    auroc_of_disagreement: float | None
    auroc_of_disagreement_interval: Interval | None

    def words(self, metric: Metric) -> list[str]:
        """Return the value of the ensemble and its disagreement, in sentences."""
        members = ", ".join("unknown" if one is None else f"{one:.3f}" for one in self.auroc)
        wrong = ", ".join(f"{100 * one.error:.0f} %" for one in self.by_disagreement)
        return [
            f"An ensemble: its {len(self.auroc)} members alone have {metric} {members}; it is ahead of their mean "
            f"by {told(self.ahead, self.ahead_interval, 3)}.",
            f"Share scored wrongly, from the least to the most disagreement of the members: {wrong} (AUROC "
            f"of the disagreement {told(self.auroc_of_disagreement, self.auroc_of_disagreement_interval, 2)}).",
        ]


def ensemble_scores(scores_MN: Floats, log_odds: bool) -> Floats:
    """Return an ensemble's scores: the log-odds of the members' mean probability, or the mean of other scores."""
    if len(scores_MN) == 1 or not log_odds:
        return np.asarray(scores_MN.mean(0))
    up_N, down_N = (-np.logaddexp(0.0, sign * scores_MN) for sign in (-1.0, 1.0))  # log σ(s), log σ(-s)
    return np.asarray(np.logaddexp.reduce(up_N, 0) - np.logaddexp.reduce(down_N, 0))


def disagreement(scores_MN: Floats, log_odds: bool) -> Floats:
    """Return the members' standard deviation, of probabilities if the scores are log-odds, else of the scores."""
    return np.asarray((probabilities(scores_MN) if log_odds else scores_MN).std(0))


def ensemble_metrics(ranking: Ranking, disagreement_N: Floats, bootstrap: ClusterBootstrap) -> Ensemble:
    """Measure an `Ensemble`."""
    score_N, truth_N = ranking.score_N, ranking.truth_N
    whole = ranking.statistic(score_N, truth_N)
    members = [ranking.statistic(scores_N, truth_N) for scores_N in ranking.members_MN]

    def ahead(weights_SN: Floats) -> Floats:
        return np.asarray(whole(weights_SN) - np.mean([member(weights_SN) for member in members], axis=0))

    wrong_N = ((score_N > 0) != truth_N).astype(np.int64)
    difference, found = bootstrap.estimate(ahead), bootstrap.estimate(auroc(disagreement_N, wrong_N))
    bins_N = equal_mass(disagreement_N, DISAGREEMENT_BINS)
    return Ensemble(
        auroc=[bootstrap.estimate(member).value for member in members],
        ahead=difference.value,
        ahead_interval=difference.interval,
        by_disagreement=[_bin(disagreement_N, wrong_N, bins_N == one) for one in np.unique(bins_N)],
        auroc_of_disagreement=found.value,
        auroc_of_disagreement_interval=found.interval,
    )


def _bin(disagreement_N: Floats, wrong_N: Labels, rows: Sequence[bool] | np.ndarray) -> DisagreementBin:
    of_rows = disagreement_N[rows]
    return DisagreementBin(disagreement=float(of_rows.mean()), error=float(wrong_N[rows].mean()), n=len(of_rows))
