"""Summary of the ratings so far: by role, and the agreement of the raters."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from perl.rating.log import Entry


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's α over the questions that several raters answered.

    Attributes:
        alpha: None if it is undefined.
    """

    questions: int
    alpha: float | None


@dataclass(frozen=True)
class RoleSummary:
    """How a role's completions were rated; pairs count if they are from two different roles."""

    role: str
    rated: int
    up: int
    compared: int
    won: int


@dataclass(frozen=True)
class Summary:
    """Attributes: raters: number of questions that each rater has answered."""

    raters: dict[str, int]
    roles: list[RoleSummary]
    thumbs: Agreement
    pairs: Agreement


def summarize(entries: Iterable[Entry], roles: Sequence[str]) -> Summary:
    """Count the valid ratings.

    Args:
        roles: in the order of the summary.
    """
    entries = list(entries)
    answered = {(one.mark.rater, one.mark.question) for one in entries}
    counts: Counter[tuple[str, str]] = Counter()
    thumbs, pairs = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for one in entries:
        shown = one.mark.shown
        if one.label is not None:
            thumbs[one.mark.question].append(one.label)
            counts.update([(shown[0].role, "rated"), (shown[0].role, "up")][: 1 + one.label])
        if one.better is not None:
            # By alphabetical order, because the two may have been shown in either order.
            pairs[one.mark.question].append(shown[one.better].text == min(drawn.text for drawn in shown))
            if shown[0].role != shown[1].role:
                counts.update((drawn.role, "compared") for drawn in shown)
                counts[shown[one.better].role, "won"] += 1
    return Summary(
        dict(Counter(rater for rater, _ in answered)),
        [
            RoleSummary(role, *(counts[role, what] for what in ("rated", "up", "compared", "won")))
            for role in roles
        ],
        _agreement(thumbs.values()),
        _agreement(pairs.values()),
    )


def _agreement(units: Iterable[Sequence[bool]]) -> Agreement:
    several = [unit for unit in units if len(unit) > 1]
    return Agreement(len(several), krippendorff_alpha(several))


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Compute Krippendorff's α of nominal values: 1 if all agree, about 0 if they agree only by chance.

    α = 1 - D_observed / D_expected = 1 - (n - 1) Σ_u [Σ_{c≠k} n_uc n_uk / (m_u - 1)] / Σ_{c≠k} n_c n_k, over
    units u with m_u ≥ 2 values, n values in all (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).

    Args:
        units: for each thing rated, the values that it was given, one per rater.

    Returns:
        None if it is undefined: nothing has two values, or all values are equal.
    """
    pairable = [Counter(unit) for unit in units if len(unit) > 1]
    totals = sum(pairable, Counter[Hashable]())
    expected = _unequal(totals)
    if not expected:
        return None
    observed = sum(_unequal(unit) / (unit.total() - 1) for unit in pairable)
    return 1 - (totals.total() - 1) * observed / expected


def _unequal(values: Counter[Hashable]) -> int:
    """Return Σ_{c≠k} n_c n_k, the number of ordered pairs of different values."""
    return int(values.total() ** 2 - sum(count**2 for count in values.values()))
