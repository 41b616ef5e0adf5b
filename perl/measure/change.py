"""A metric before and after, with its change in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perl.measure.bootstrap import Interval

HARDLY = 0.02
"""A loss has hardly changed if the interval shows a change by a smaller share."""
ROUNDING = 1e-9
"""Share of a change by which the ends of its interval may differ from rounding errors alone."""
LARGEST, SMALLEST, LEAST_PLACES = 1e5, 1e-3, 4
"""Numbers of at least the first, or below the second and with more places than the third, have an exponent."""
MOST_PLACES, MOST_DIGITS = 15, 4
"""Largest number of digits after the point, without and with an exponent."""


@dataclass(frozen=True)
class Change:
    """A metric before and after, and the 95 % interval of its change; None if there is no interval."""

    before: float
    after: float
    interval: Interval | None


def told(value: float | None, interval: Sequence[float] | None = None, places: int = 2) -> str:
    """Format a value as in "0.91 (0.89 to 0.92)"; "unknown" for None."""
    if value is None:
        return "unknown"
    ends = "" if interval is None else f" ({fixed(interval[0], places)} to {fixed(interval[1], places)})"
    return f"{fixed(value, places)}{ends}"


def change_verb(interval: Interval, little: float = 0.0) -> str:
    """Return whether a value rose, fell, did not clearly change or hardly changed.

    Args:
        interval: 95 % interval of the change. The value "rose" or "fell" only if this excludes 0.
        little: the value hardly changed if the whole interval is within ± this.
    """
    if -little < interval[0] and interval[1] < little:
        return "hardly changed"
    return "rose" if interval[0] > 0 else "fell" if interval[1] < 0 else "did not clearly change"


def change_words(before: str, after: str, interval: Interval | None, little: float = 0.0) -> str:
    """Describe a change as in "rose, 0.10 before and 0.90 after".

    Args:
        before: the formatted value; likewise `after`.
        interval: as in `change_verb`, like `little`. None: only both values are given.
    """
    ends = f"{before} before and {after} after"
    return f"was {ends}" if interval is None else f"{change_verb(interval, little)}, {ends}"


def equal_words(interval: Interval | None) -> str | None:
    """Return what the 95 % interval of a change says if it has no width: all dialogues have the same mean change.

    None if it has a width, or is None.
    """
    if interval is None or interval[1] - interval[0] > ROUNDING * max(map(abs, interval)):
        return None
    return f"{'equal' if any(interval) else '0'} in every dialogue"


def measured_words(
    before: float,
    after: float,
    interval: Interval | None,
    *,
    percent: bool = False,
    little: float = 0.0,
    rows: str = "prompts",
) -> str:
    """Describe a change as in "rose, 0.30 before and 0.93 after (95 % interval of the change: +0.55 to +0.71)".

    Args:
        before: a mean over rows; likewise `after`.
        interval: as in `change_verb`, like `little`; None if all rows belong to one dialogue.
        percent: whether to write shares as percentages.
        rows: name of the rows.
    """
    scale, unit, points = (100.0, " %", " points") if percent else (1.0, "", "")
    equal = equal_words(interval)
    width = interval[1] - interval[0] if interval and not equal else 0.0
    moved = width or abs(after - before)
    places = places_of(scale * moved) if moved else max(2, places_of(scale * abs(before)))
    words = change_words(
        f"{fixed(scale * before, places)}{unit}", f"{fixed(scale * after, places)}{unit}", interval, little
    )
    if interval is None:
        return f"{words} (all {rows} are from one dialogue: too few to tell)"
    if equal:
        return f"{words} (the change is {equal})"
    low, high = (fixed(scale * end, places, sign=True) for end in interval)
    return f"{words} (95 % interval of the change: {low} to {high}{points})"


def places_of(size: float) -> int:
    """Return the decimal places for two significant digits; negative for insignificant digits before the point."""
    return min(MOST_PLACES, 1 - math.floor(math.log10(size))) if size > 0 else 2


def fixed(value: float, places: int, *, sign: bool = False) -> str:
    """Format a number to `places` decimal places, as 0.30, or 3.788e6 or 1.2e-6 if very large or small; never -0.

    Numbers below 1 are never rounded to 1: 0.998 does not become 1.00.

    Args:
        places: as from `places_of`.
        sign: write the sign of positive numbers, too.
    """
    plus, size = "+" if sign else "", abs(value)
    tiny = 0 < size < SMALLEST and places > LEAST_PLACES
    if size >= LARGEST or tiny:
        shown = math.floor(math.log10(size)) + places
        if shown < 0 and tiny:
            return f"{plus}0"
        mantissa, exponent = f"{value:{plus}.{min(max(shown, 1 - tiny), MOST_DIGITS)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    below_1 = range(places, places + 3) if places >= 2 and size < 1 else ()
    places = next((enough for enough in below_1 if round(size, enough) < 1), places)
    text = f"{value:{plus}.{max(0, places)}f}"
    return text if text.strip("+-0.") else text.replace("-", plus)
