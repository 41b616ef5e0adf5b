"""Length bias: scores against the length of completions, and the ranking among completions of similar length.

Axis letters: S resamples, N completions, P pairs.
"""

from dataclasses import dataclass

import numpy as np

from perl.measure.bootstrap import ClusterBootstrap, Floats, Interval, Statistic, ratio, value_of
from perl.measure.metrics import Labels, auroc, equal_mass, share_right

STRATA = 20


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Spearman's correlation of score and length, AUROC of length (longer is better), and the ranking beyond it.

    Strata are twentieths of the completions by length, within which lengths still differ a little. The criterion
    is therefore `ahead`: the AUROC within strata minus that of length itself, in the direction in which the scores
    follow it. It is at most 0 for any monotonic, noisy function of length.

    For pairs, all values are computed from differences, and each AUROC is a pairwise accuracy. Strata are
    twentieths by the difference between the two lengths. Within each stratum, the pairs with a longer and those
    with a shorter better completion have equal weight, so that length itself is right half of the time.
    """

    correlation: float | None
    auroc_of_length: float | None
    auroc_within: float | None
    auroc_within_interval: Interval | None
    ahead: float | None
    ahead_interval: Interval | None


def length_bias(scores: Floats, lengths: Floats, labels: Labels, bootstrap: ClusterBootstrap) -> LengthBias:
    """Measure the dependence of scores and labels on length (characters), and the scores' ranking beyond it."""
    correlation = spearman(scores, lengths)
    strata = equal_mass(lengths, STRATA)
    within = auroc(scores, labels, strata)
    length_within = auroc(lengths if (correlation or 0.0) >= 0 else -lengths, labels, strata)
    matched = bootstrap.estimate(within)
    ahead = bootstrap.estimate(lambda weights_SN: within(weights_SN) - length_within(weights_SN))
    return LengthBias(
        correlation=correlation,
        auroc_of_length=value_of(auroc(lengths, labels), len(labels)),
        auroc_within=matched.value,
        auroc_within_interval=matched.interval,
        ahead=ahead.value,
        ahead_interval=ahead.interval,
    )


def length_bias_of_pairs(scores_P: Floats, lengths_P: Floats, bootstrap: ClusterBootstrap) -> LengthBias:
    """Measure the length bias of a model of pairs.

    Args:
        scores_P: the better completion's score minus the worse one's.
        lengths_P: the same difference of their lengths in characters.
    """
    matched = bootstrap.estimate(_length_balanced_accuracy(scores_P, lengths_P))
    ends = None if matched.interval is None else (matched.interval[0] - 0.5, matched.interval[1] - 0.5)
    both_ways = (np.concatenate([one, -one]) for one in (scores_P, lengths_P))
    return LengthBias(
        correlation=spearman(*both_ways),
        auroc_of_length=value_of(share_right(lengths_P), len(lengths_P)),
        auroc_within=matched.value,
        auroc_within_interval=matched.interval,
        ahead=None if matched.value is None else matched.value - 0.5,
        ahead_interval=ends,
    )


def _length_balanced_accuracy(scores_P: Floats, lengths_P: Floats) -> Statistic:
    """Return the pairwise accuracy with equal weight for longer and shorter better completions in each stratum.

    Completions of equal length count as half longer and half shorter.
    """
    strata = equal_mass(np.abs(lengths_P), STRATA)
    groups = [np.flatnonzero(strata == one) for one in np.unique(strata)]
    right_P, longer_P = np.heaviside(scores_P, 0.5), np.heaviside(lengths_P, 0.5)

    def statistic(weights_SP: Floats) -> Floats:
        right_S, compared_S = np.zeros(len(weights_SP)), np.zeros(len(weights_SP))
        for rows in groups:
            longer, shorter = (weights_SP[:, rows] * one[rows] for one in (longer_P, 1 - longer_P))
            longer_S, shorter_S = longer.sum(axis=1), shorter.sum(axis=1)
            right_S += (longer @ right_P[rows] * shorter_S + shorter @ right_P[rows] * longer_S) / 2
            compared_S += longer_S * shorter_S
        return ratio(right_S, compared_S)

    return statistic


def spearman(one: Floats, other: Floats) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None if either is constant."""
    from scipy.stats import spearmanr  # takes 1 s to import, not needed to read a card

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(spearmanr(one, other).statistic)
