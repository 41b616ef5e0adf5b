"""Length bias: scores against the length of completions, and the ranking among completions of similar length."""

from dataclasses import dataclass

import numpy as np

from perl.measure.bootstrap import ClusterBootstrap, Floats, Interval, value_of
from perl.measure.metrics import Labels, auroc, equal_mass

STRATA = 20


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Spearman's correlation of score and length, AUROC of length (longer is better), and the ranking beyond it.

    Strata are twentieths of the completions by length, within which lengths still differ a little. The criterion
    is therefore `ahead`: the AUROC within strata minus that of length itself, in the direction in which the scores
    follow it. It is at most 0 for any monotonic, noisy function of length.
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


def spearman(one: Floats, other: Floats) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None if either is constant."""
    from scipy.stats import spearmanr  # takes 1 s to import, not needed to read a card

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(spearmanr(one, other).statistic)
