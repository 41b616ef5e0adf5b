"""Formats numbers for people."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from perl.measure.bootstrap import Interval
from perl.measure.change import fixed, places_of

MINUS = "−"
NONE = "–"
GAP = "\u00a0"
"""A non-breaking space between a number and its unit."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs; a single run has no standard deviation."""

    mean: float
    sd: float | None
    n: int

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mean, from Student's distribution with n - 1 degrees of freedom."""
        if self.sd is None:
            return None
        from scipy.special import stdtrit  # takes half a second to import

        half = float(stdtrit(self.n - 1, 0.975)) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and sample standard deviation (n - 1) of the known values; None if there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Spread(float(np.mean(known)), sd, len(known)) if known else None


def decimal(value: float, places: int = 2) -> str:
    """Format as `perl.measure.change.fixed`, with a true minus sign."""
    return fixed(value, places).replace("-", MINUS)


def true_minus(text: str) -> str:
    """Replace the hyphens before numbers and exponents with true minus signs."""
    return re.sub(r"((?<!\w)|(?<=\de))-(?=\d)", MINUS, text)


def signed(value: float, places: int = 2) -> str:
    """Format as `decimal`, with the sign."""
    text = decimal(value, places)
    return text if text.startswith(MINUS) else f"+{text}"


def plain(value: float) -> str:
    """Format a number of any size with two decimal places, or more to show two significant digits."""
    return decimal(value, max(2, places_of(abs(value))))


def number(value: float) -> str:
    """Format as `plain`, with the sign."""
    return signed(value, max(2, places_of(abs(value))))


def percent(share: float, places: int = 0) -> str:
    """Format a share as a percentage."""
    return f"{decimal(100 * share, places)}{GAP}%"


def _scaled(value: float, units: Sequence[str], gap: str) -> str:
    size, unit = value, units[0]
    for bigger in units[1:]:
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, bigger
    places = 0 if abs(size) >= 99.5 or unit == units[0] else 1
    return f"{size:.{places}f}{gap if unit else ''}{unit}"


def bytes_text(count: float) -> str:
    """Format as in 1.7 GB (10⁹ bytes)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"), GAP)


def count_text(count: float) -> str:
    """Format as in 123k or 7.1B."""
    return _scaled(count, ("", "k", "M", "B", "T"), "")


def flops_text(count: float) -> str:
    """Format as in 3.4 PFLOP."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"), GAP)


def seconds_text(seconds: float) -> str:
    """Format as in 8.3 s, 4 min 12 s or 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f}{GAP}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(round(seconds / 60), 60)
    if minutes < 1:
        return f"{rest}{GAP}s"
    if hours < 1:
        return f"{minutes}{GAP}min{GAP}{rest:02d}{GAP}s"
    return f"{hours}{GAP}h{GAP}{minutes_left:02d}{GAP}min"


def rate_text(per_second: float) -> str:
    """Format tokens per second."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def spread_text(value: Spread | None, places: int = 2, sign: bool = False) -> str:
    """Format as in 0.71 ± 0.03; with a leading + if `sign`."""
    if value is None:
        return NONE
    mean = signed(value.mean, places) if sign else decimal(value.mean, places)
    return mean if value.sd is None else f"{mean}{GAP}±{GAP}{decimal(value.sd, places)}"


def mean_text(value: Spread | None, places: int = 2, sign: bool = False) -> str:
    """Format as in 0.71 ± 0.03, where the second number is half of the mean's 95 % interval."""
    if value is None or value.interval is None:
        return spread_text(value, places, sign)
    return spread_text(Spread(value.mean, value.interval[1] - value.mean, value.n), places, sign)


def plus_minus(value: Spread) -> str:
    """Format only the spread over seeds; empty for a single run."""
    return "" if value.sd is None else f"± {decimal(value.sd)} over {value.n} seeds"


def interval_text(interval: Interval | None, places: int = 2) -> str:
    """Format as in 0.89 to 0.93."""
    return NONE if interval is None else " to ".join(decimal(end, places) for end in interval)


def joined(words: Sequence[str]) -> str:
    """Join words as in a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
