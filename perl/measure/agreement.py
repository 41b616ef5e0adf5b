"""How far people who rate the same agree."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's α of nominal values: 1 where all agree, about 0 where they agree as often as by chance.

    α = 1 - D_observed / D_expected = 1 - (n - 1) Σ_u [Σ_{c≠k} n_uc n_uk / (m_u - 1)] / Σ_{c≠k} n_c n_k, over
    units u with m_u ≥ 2 values, n values in all (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).

    Args:
        units: of each thing rated, the values that it was given, one a rater.

    Returns:
        None where it is undefined: nothing has two values, or all values are the same.
    """
    pairable = [Counter(unit) for unit in units if len(unit) > 1]
    totals = sum(pairable, Counter[Hashable]())
    expected = _unequal(totals)
    if not expected:
        return None
    observed = sum(_unequal(unit) / (unit.total() - 1) for unit in pairable)
    return 1 - (totals.total() - 1) * observed / expected


def _unequal(values: Counter[Hashable]) -> int:
    """Σ_{c≠k} n_c n_k: the ordered pairs of different values."""
    return int(values.total() ** 2 - sum(count**2 for count in values.values()))
