"""A figure before and after in words, which claim no more than the figures do."""

import math

from perl.measure.bootstrap import Interval

HARDLY = 0.02
"""A loss that changed by a smaller share is said to have hardly changed: its interval is not known."""


def change_words(before: str, after: str, interval: Interval | None) -> str:
    """As in "rose, 0.10 before and 0.90 after".

    Args:
        before: the figure as it is to be read; so is `after`.
        interval: of the change, 95 %. It "rose" or "fell" only where this excludes 0. None: only both ends.
    """
    ends = f"{before} before and {after} after"
    if interval is None:
        return f"was {ends}"
    verb = "rose" if interval[0] > 0 else "fell" if interval[1] < 0 else "did not clearly change"
    return f"{verb}, {ends}"


def measured_words(before: float, after: float, interval: Interval | None, percent: bool = False) -> str:
    """As in "rose, 0.30 before and 0.93 after (95 % interval of the change: +0.55 to +0.71)".

    Args:
        before: a mean over prompts; so is `after`.
        interval: as in `change_words`; None where all prompts are of one dialogue.
        percent: whether it is a share, to be told in per cent.
    """
    scale, unit, points = (100.0, " %", " points") if percent else (1.0, "", "")
    width = interval[1] - interval[0] if interval else 0.0
    places = places_of(scale * (width or abs(after - before)))
    told = change_words(f"{scale * before:.{places}f}{unit}", f"{scale * after:.{places}f}{unit}", interval)
    if interval is None:
        return f"{told} (all prompts are of one dialogue: too few to tell)"
    low, high = (f"{scale * end:+.{places}f}" for end in interval)
    return f"{told} (95 % interval of the change: {low} to {high}{points})"


def places_of(size: float) -> int:
    """Decimal places that show two digits of a number of this size; of an interval's width, what it can bear."""
    return min(6, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 2


def loss_verb(before: float, after: float) -> str:
    """Whether a loss fell, rose or hardly changed."""
    if abs(after - before) < HARDLY * abs(before):
        return "hardly changed"
    return "fell" if after < before else "rose"


def loss_words(before: float, after: float) -> str:
    """As in "fell, 1.310 before and 0.420 after"."""
    return f"{loss_verb(before, after)}, {before:.3f} before and {after:.3f} after"
