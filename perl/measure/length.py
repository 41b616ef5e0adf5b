"""Is it only length? Scores beside how long answers are, and the ranking among answers of like length."""

from typing import Any

import numpy as np

from perl.measure.bootstrap import Floats, Resampled, plain
from perl.measure.metrics import Labels, auroc, equal_mass

STRATA = 20


def length_bias(scores: Floats, lengths: Floats, labels: Labels, resampled: Resampled) -> dict[str, Any]:
    """How scores and labels go with length, and what the scores rank beyond it.

    Strata are twentieths of the answers by length. Even there longer answers differ a little from shorter ones, so
    what counts is `ahead`: the AUROC within strata less that of length itself, taken in the direction in which
    the scores follow it. Of a scorer that only counts, however it bends or adds noise to the count, it is at
    most 0.

    Args:
        lengths: of the answers, in characters.

    Returns:
        as JSON: Spearman's `correlation` of score and length, `auroc_of_length` (longer is better), and with
        95 % intervals `auroc_within` strata and `ahead`.
    """
    correlation = spearman(scores, lengths)
    strata = equal_mass(lengths, STRATA)
    within = auroc(scores, labels, strata)
    length_within = auroc(lengths if (correlation or 0.0) >= 0 else -lengths, labels, strata)
    matched = resampled.estimate(within)
    ahead = resampled.estimate(lambda weights_SN: within(weights_SN) - length_within(weights_SN))
    return {
        "correlation": correlation,
        "auroc_of_length": plain(auroc(lengths, labels), len(labels)),
        "auroc_within": matched.value,
        "auroc_within_interval": matched.interval,
        "ahead": ahead.value,
        "ahead_interval": ahead.interval,
    }


def spearman(one: Floats, other: Floats) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where either is constant."""
    if one.min() == one.max() or other.min() == other.max():
        return None
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (count.cumsum() - (count - 1) / 2)[place]
    return ranks
