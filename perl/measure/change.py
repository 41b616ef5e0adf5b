"""A metric before and after, in words."""

import math
from collections.abc import Sequence

from perl.measure.bootstrap import Interval

HARDLY = 0.02
"""A loss of which the interval shows that it changed by a smaller share has hardly changed."""
LARGEST, SMALLEST, LEAST_PLACES = 1e5, 1e-3, 4
"""Numbers at least so large, or smaller and to more places than the last, are written with an exponent."""
MOST_PLACES, MOST_DIGITS = 15, 4
"""Digits after the point at most, without an exponent and with one."""


def told(value: float | None, interval: Sequence[float] | None = None, places: int = 2) -> str:
    """As in "0.91 (0.89 to 0.92)"; "unknown" for None."""
    if value is None:
        return "unknown"
    ends = "" if interval is None else f" ({fixed(interval[0], places)} to {fixed(interval[1], places)})"
    return f"{fixed(value, places)}{ends}"


def change_verb(interval: Interval, little: float = 0.0) -> str:
    """Whether a value rose, fell, did not clearly change or hardly changed.

    Args:
        interval: of the change, 95 %. The value "rose" or "fell" only where this excludes 0.
        little: a change that lies below this throughout the interval, up or down, is hardly one.
    """
    if -little < interval[0] and interval[1] < little:
        return "hardly changed"
    return "rose" if interval[0] > 0 else "fell" if interval[1] < 0 else "did not clearly change"


def change_words(before: str, after: str, interval: Interval | None, little: float = 0.0) -> str:
    """As in "rose, 0.10 before and 0.90 after".

    Args:
        before: the value as it is to be read; so is `after`.
        interval: as in `change_verb`, as is `little`. None: only both ends.
    """
    ends = f"{before} before and {after} after"
    return f"was {ends}" if interval is None else f"{change_verb(interval, little)}, {ends}"


def measured_words(
    before: float,
    after: float,
    interval: Interval | None,
    *,
    percent: bool = False,
    little: float = 0.0,
    rows: str = "prompts",
) -> str:
    """As in "rose, 0.30 before and 0.93 after (95 % interval of the change: +0.55 to +0.71)".

    Args:
        before: a mean over rows; so is `after`.
        interval: as in `change_verb`, as is `little`; None where all rows are of one dialogue.
        percent: whether it is a share, to be written in per cent.
        rows: what they are.
    """
    scale, unit, points = (100.0, " %", " points") if percent else (1.0, "", "")
    width = interval[1] - interval[0] if interval else 0.0
    moved = width or abs(after - before)
    places = places_of(scale * moved) if moved else max(2, places_of(scale * abs(before)))
    words = change_words(
        f"{fixed(scale * before, places)}{unit}", f"{fixed(scale * after, places)}{unit}", interval, little
    )
    if interval is None:
        return f"{words} (all {rows} are of one dialogue: too few to tell)"
    low, high = (fixed(scale * end, places, sign=True) for end in interval)
    return f"{words} (95 % interval of the change: {low} to {high}{points})"


def places_of(size: float) -> int:
    """Decimal places for two significant digits; negative: digits left of the point that are not significant."""
    return min(MOST_PLACES, 1 - math.floor(math.log10(size))) if size > 0 else 2


def fixed(value: float, places: int, *, sign: bool = False) -> str:
    """A number to so many decimal places, as in 0.30, or 3.788e6 or 1.2e-6 if very large or small; never -0.

    What is less than 1 is not said to be: 0.998 is not 1.00.

    Args:
        places: as from `places_of`.
        sign: write the sign of a positive number too.
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
