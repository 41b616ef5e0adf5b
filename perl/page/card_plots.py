"""Plots of the reward model's card: can its probabilities and its ranking be trusted?"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from perl.page.plots import BG, FG, HATCHES, MUTED, SERIES, Plot, drawing, titled, to_svg
from perl.page.schema import ReliabilityBin, RewardEval


def reliability_plot(card: RewardEval) -> Plot | None:
    """Observed share against the probability given, a point a bin; as it is, and scaled where that is known."""
    scaling = card.calibration
    before = scaling.reliability_before if scaling is not None else card.reliability
    after = scaling.reliability_after if scaling is not None else None
    if not before:
        return None
    of = scaling.of if scaling is not None else "a thumb up"
    with drawing(height=2.9) as drawn:
        axes = titled(drawn.subplots(), "Reliability", f"probability given of {of}", "share observed")
        axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=MUTED, linewidth=1.2)
        axes.text(0.98, 0.06, "dashed: perfectly calibrated", ha="right", color=MUTED, fontsize=8.5)
        if after:
            _points(axes, before, MUTED, "o", "as it is")
            _points(axes, after, SERIES[0], "D", "scaled")
            axes.legend(loc="upper left")
        else:
            _points(axes, before, SERIES[0], "o", "as it is", errors=True)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        pairs = "; ".join(f"{one.probability:.2f} given, {one.share:.2f} observed" for one in after or before)
        svg = to_svg(drawn, "reliability", f"Reliability diagram{' (scaled)' if after else ''}: {pairs}")
    counts = [one.n for one in before]
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return Plot(
        svg,
        f"A point for {each} answers of like probability. Below the dashed line the model is too sure of {of}, "
        "above it not sure enough.",
    )


def _points(
    axes: Axes, bins: Sequence[ReliabilityBin], colour: str, marker: str, label: str, errors: bool = False
) -> None:
    """A point a bin, joined; with errors, strokes to where it should be."""
    given, seen = [one.probability for one in bins], [one.share for one in bins]
    if errors:
        axes.vlines(given, given, seen, color=SERIES[1], linewidth=1.4)
    axes.plot(
        given, seen, color=colour, linewidth=1.6, marker=marker, markersize=5, markeredgecolor=BG, label=label
    )


def scores_plot(card: RewardEval) -> Plot | None:
    """How the scores of answers rated up and down are spread."""
    counts = card.score_histogram
    if counts is None or not len(counts.edges) - 1 == len(counts.up) == len(counts.down) > 0:
        return None
    edges = np.asarray(counts.edges)
    with drawing(height=2.9) as drawn:
        axes = titled(drawn.subplots(), "Scores", "score (log-odds of a thumb up)", "answers")
        up, down, widths = np.asarray(counts.up), np.asarray(counts.down), np.diff(edges)
        axes.bar(edges[:-1], up, widths, align="edge", color=SERIES[0], edgecolor=BG)
        axes.bar(edges[:-1], -down, widths, align="edge", color=SERIES[1], hatch=HATCHES[1], edgecolor=BG)
        axes.axhline(0, color=FG, linewidth=1.0)
        top = 1.25 * max(*counts.up, *counts.down, 1)
        axes.set_ylim(-top, top)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
        axes.text(0.02, 0.97, "rated up", transform=axes.transAxes, va="top", fontweight="bold", fontsize=9)
        axes.text(0.02, 0.03, "rated down", transform=axes.transAxes, fontweight="bold", fontsize=9)
        svg = to_svg(drawn, "scores", "Histogram of scores: answers rated up above the line, rated down below")
    return Plot(svg, "The less the two heaps overlap sideways, the better the model tells good answers from bad.")
