"""A figure before and after in words, which claim no more than the figures do."""

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


def loss_verb(before: float, after: float) -> str:
    """Whether a loss fell, rose or hardly changed."""
    if abs(after - before) < HARDLY * abs(before):
        return "hardly changed"
    return "fell" if after < before else "rose"


def loss_words(before: float, after: float) -> str:
    """As in "fell, 1.310 before and 0.420 after"."""
    return f"{loss_verb(before, after)}, {before:.3f} before and {after:.3f} after"
