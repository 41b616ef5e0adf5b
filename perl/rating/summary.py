"""What the ratings so far say: of the roles, and of how far the raters agree."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from perl.rating.log import Entry


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's α over the questions that several raters answered.

    Attributes:
        alpha: None where it is undefined.
    """

    questions: int
    alpha: float | None


@dataclass(frozen=True)
class RoleSummary:
    """How a role's completions were rated; pairs count where two different roles were side by side."""

    role: str
    rated: int
    up: int
    compared: int
    won: int


@dataclass(frozen=True)
class Summary:
    """Attributes: raters: how many questions each has answered."""

    raters: dict[str, int]
    roles: list[RoleSummary]
    thumbs: Agreement
    pairs: Agreement


def summarize(entries: Iterable[Entry], roles: Sequence[str]) -> Summary:
    """Count the ratings in force.

    Args:
        roles: in the order wanted.
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
            # Which it was in alphabetical order: the two may have been shown in either.
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
