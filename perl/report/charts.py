"""Plots of metrics by step, of the reward model, of costs, and of a sweep's quality by trained weights."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from perl.measure.metrics import ReliabilityBin
from perl.measure.probe import PHASES
from perl.measure.reward_model_card import RewardModelCard
from perl.report.numbers import Spread, bytes_text, count_text, decimal, mean_text, percent, plain, seconds_text
from perl.report.outcome import smooth, window
from perl.report.runs import Group, Series
from perl.report.svg import BG, FG, MUTED, SERIES, Hover, Plot, drawing, titled, to_svg
from perl.report.words import STAGE
from perl.system.progress import counted

KINDS = {
    "base_weights": "base weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "kv_cache": "KV cache",
}
LABEL_ROOM = 0.0235
"""A segment is labelled if its share of the widest bar is at least this per letter."""
MOST_HOVERS = 60
"""Maximum number of steps of a plot with hover text."""
MARKERS = ("o", "s", "^", "D")
NORMAL_95 = 1.96
"""Standard errors on each side of a mean."""
Bar = tuple[str, Mapping[str, float], str]
"""A row's label, its segments by name, and their total as text."""


def step_plot(
    group: Group,
    role: str,
    metric: str,
    title: str,
    unit: str,
    ends: Sequence[Spread | None] = (),
    scale: float = 1.0,
) -> Plot | None:
    """Plot a metric over training steps; None if no run has it.

    Args:
        ends: the held-out means before and after training, drawn as horizontal lines.
        scale: factor for the metric and the ends.
    """
    known = [scale * values for run in group.runs if (values := run.metrics[role].get(metric)) is not None]
    series = [values for values in known if np.isfinite(values).any()]
    if not series:
        return None
    length = min(len(values) for values in series)
    steps, smoothed = np.arange(1, length + 1), np.array([smooth(values)[:length] for values in series])
    mean = smoothed.mean(axis=0)
    with drawing() as drawn:
        axes = titled(drawn.subplots(), title, "step", unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        if metric == "loss":
            axes.set_ylim(0, 1.1 * np.nanmax([np.nanmax(values) for values in series]))
        if len(series) == 1:
            axes.plot(steps, series[0], "o", color=MUTED, markersize=2.6, alpha=0.55, markeredgewidth=0)
            half = NORMAL_95 * _spread_of_steps(series[0]) / np.sqrt(window(length))
            caption = f"Dots: single steps. Line: their mean over {window(length)} steps, with its 95 % interval."
        else:
            axes.plot(steps, smoothed.T, color=MUTED, linewidth=0.9, alpha=0.65)
            half = smoothed.std(axis=0, ddof=1)
            caption = f"Thin lines: each of {len(series)} seeds, smoothed. Thick line: mean ± standard deviation."
        axes.fill_between(steps, mean - half, mean + half, color=SERIES[0], alpha=0.16, linewidth=0)
        axes.plot(steps, mean, color=SERIES[0], linewidth=2.4)
        _end_lines(axes, [None if end is None else scale * end.mean for end in ends])
        spoken = f"{title}: from {plain(mean[0])} to {plain(mean[-1])} ({unit})"
        hovers = step_hovers(axes, title, mean)
        svg = to_svg(drawn, f"steps-{role}-{metric}", spoken, hovers)
    return Plot(svg, caption + (" Dashed: held-out prompts before and after RL." if any(ends) else ""))


def _end_lines(axes: Axes, ends: Sequence[float | None]) -> None:
    """Draw horizontal lines at the values before and after, with their names outside the axes."""
    known = [(value, name) for value, name in zip(ends, ("before", "after"), strict=False) if value is not None]
    for value, name in known:
        above = value == max(value for value, _ in known)  # so that the names of close values do not overlap
        axes.axhline(value, color=FG, linewidth=1.0, linestyle=(0, (4, 3)))
        text = axes.annotate(name, (1, value), (4, 0), ("axes fraction", "data"), "offset points")
        text.set(va="bottom" if above else "top", fontsize=8.5)


def step_hovers(axes: Axes, label: str, values: Series) -> list[Hover]:
    """Return hover text for each step's part of the axes; for evenly spaced steps if there are many."""
    shown = np.unique(np.linspace(0, len(values) - 1, MOST_HOVERS).astype(int))
    edges = [0.5, *((shown[1:] + shown[:-1]) / 2 + 1), len(values) + 0.5]
    places = [one for one in zip(shown, pairwise(edges), strict=True) if np.isfinite(values[one[0]])]
    return [Hover(axes, ends, None, f"step {step + 1}: {label} {plain(values[step])}") for step, ends in places]


def _spread_of_steps(values: Series) -> Series:
    """Return the standard deviation of the steps around their moving mean."""
    centred: Series = np.sqrt(np.maximum(smooth((values - smooth(values)) ** 2), 0.0))
    return centred


def reliability_plot(card: RewardModelCard) -> Plot:
    """Plot the observed share against the predicted probability by bin, unscaled and, if known, scaled."""
    scaling = card.calibration
    before, after = scaling.reliability_before, scaling.reliability_after
    with drawing(height=2.9) as drawn:
        axes = titled(drawn.subplots(), "Reliability", f"predicted probability of {scaling.of}", "observed share")
        axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=MUTED, linewidth=1.2)
        axes.text(0.98, 0.06, "dashed: perfectly calibrated", ha="right", color=MUTED, fontsize=8.5)
        _points(axes, before, MUTED, "o", "unscaled")
        if after is not None:
            _points(axes, after, SERIES[0], "D", "scaled")
        axes.legend(loc="upper left")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        bins = after or before
        told = [f"{one.probability:.2f} predicted, {one.share:.2f} observed" for one in bins]
        hovers = [
            Hover(axes, (one.probability,) * 2, (one.share,) * 2, f"{words}, {counted(one.n, 'answer')}")
            for one, words in zip(bins, told, strict=True)
        ]
        spoken = f"Reliability diagram{' (scaled)' if after else ''}: {'; '.join(told)}"
        svg = to_svg(drawn, "reliability", spoken, hovers)
    fewest, most = min(one.n for one in before), max(one.n for one in before)
    each = f"{most}" if fewest == most else f"{fewest} to {most}"
    sure = f"Below the dashed line the model is too confident of {scaling.of}, above it not confident enough."
    return Plot(svg, f"Each point is {each} answers with similar probability. {sure}")


def _points(axes: Axes, bins: Sequence[ReliabilityBin], colour: str, marker: str, label: str) -> None:
    predicted, observed = [one.probability for one in bins], [one.share for one in bins]
    axes.plot(predicted, observed, color=colour, marker=marker, markersize=5, markeredgecolor=BG, label=label)


def scores_plot(card: RewardModelCard) -> Plot | None:
    """Plot histograms of the scores of answers rated up and down; None if the card's counts are inconsistent."""
    counts = card.score_histogram
    if not len(counts.edges) - 1 == len(counts.up) == len(counts.down) > 0:
        return None
    edges = np.asarray(counts.edges)
    with drawing(height=2.9) as drawn:
        score, kinds = "score (log-odds of a thumb up)", ("rated up", "rated down")
        if card.compared:
            score, kinds = "score minus that of the other answer of the pair", ("better", "worse")
        axes = titled(drawn.subplots(), "Scores", score, "answers")
        for sign, values, colour, y in ((1, counts.up, SERIES[0], 0.92), (-1, counts.down, SERIES[1], 0.03)):
            heights = sign * np.asarray(values)
            axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=colour, edgecolor=BG)
            axes.text(0.02, y, kinds[sign < 0], transform=axes.transAxes, fontweight="bold", fontsize=9)
        axes.axhline(0, color=FG, linewidth=1.0)
        top = 1.25 * max(*counts.up, *counts.down, 1)
        axes.set_ylim(-top, top)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
        told = [f"{up} {kinds[0]}, {down} {kinds[1]}" for up, down in zip(counts.up, counts.down, strict=True)]
        spoken = f"Histogram of the scores of answers: {kinds[0]} above the line, {kinds[1]} below"
        svg = to_svg(drawn, "scores", spoken, bin_hovers(axes, counts.edges, told))
    return Plot(svg, "The less the two overlap horizontally, the better the model tells good answers from bad.")


def bin_hovers(axes: Axes, edges: Sequence[float], words: Sequence[str]) -> list[Hover]:
    """Return hover text for each bin of a histogram."""
    return [
        Hover(axes, ends, None, f"{decimal(ends[0])} to {decimal(ends[1])}: {said}")
        for ends, said in zip(pairwise(edges), words, strict=True)
    ]


def cost_plots(groups: Sequence[Group]) -> list[Plot]:
    """Plot each group's first run: peak memory by stage and phase, on one scale, and time by stage and phase."""
    runs = [(group, group.first.stages) for group in groups if group.first.stages]
    widest = max(
        (one.peak for _, stages in runs for stage in stages.values() for one in stage.memory.values()), default=1
    )
    memory, time = [], []
    for group, stages in runs:
        label = group.label if group.tuning == "lora" else group.label.lower()
        under = f"under {label}, seed {group.first.report.seed}"
        bars: list[Bar] = [
            (f"{STAGE[name]} · {phase}", {KINDS[kind]: n for kind, n in one.kinds.items()}, bytes_text(one.peak))
            for name, stage in stages.items()
            for phase, one in stage.memory.items()
        ]
        spoken = f"Peak memory {under}: {'; '.join(f'{label} {total}' for label, _, total in bars)}"
        svg = _bars(bars, list(KINDS.values()), f"memory-{group.tuning}", spoken, widest, bytes_text)
        memory.append(Plot(svg, f"Peak memory of each phase {under}."))
        bars = []
        for name, stage in stages.items():
            seconds = {str(phase): seconds for phase, seconds in stage.phase_seconds.items()}
            bars.append((STAGE[name], seconds, seconds_text(sum(seconds.values()))))
        spoken = f"Time by phase {under}: {'; '.join(f'{label}: {_shares(one)}' for label, one, _ in bars)}."
        longest = max(sum(one.values()) for _, one, _ in bars)
        svg = _bars(bars, PHASES, f"time-{group.tuning}", spoken, longest, seconds_text)
        time.append(Plot(svg, spoken))
    return memory + time


def _shares(seconds: Mapping[str, float]) -> str:
    """Format as in generate 41 %, update 50 %."""
    total = max(sum(seconds.values()), 1e-9)
    return ", ".join(f"{name} {percent(value / total)}" for name, value in seconds.items() if value > 0)


def _bars(
    bars: Sequence[Bar],
    order: Sequence[str],
    plot: str,
    spoken: str,
    widest: float,
    text: Callable[[float], str],
) -> Markup:
    names = [name for name in order if any(segments.get(name, 0) > 0 for _, segments, _ in bars)]
    columns = 4 if sum(map(len, names)) < 30 else 3
    with drawing(height=0.25 + 0.3 * len(bars) + 0.24 * -(-len(names) // columns)) as drawn:
        axes, hovers = drawn.subplots(), list[Hover]()
        starts = np.zeros(len(bars))
        for name in names:
            widths = np.array([segments.get(name, 0.0) for _, segments, _ in bars])
            colour = SERIES[order.index(name)]  # the same colour in all plots
            axes.barh(range(len(bars)), widths, 0.72, left=starts, color=colour, edgecolor=BG, label=name)
            for row, width in enumerate(widths):
                if width > 0:
                    ends = starts[row], starts[row] + width
                    words = f"{bars[row][0]}: {name} {text(width)}"
                    hovers.append(Hover(axes, ends, (row - 0.36, row + 0.36), words))
                if width > LABEL_ROOM * widest * (len(name) + 1):
                    middle = starts[row] + width / 2
                    axes.text(middle, row, name, ha="center", va="center", fontsize=7.5, color=BG)
            starts += widths
        for row, (_, _, total) in enumerate(bars):
            axes.text(starts[row] + 0.015 * widest, row, total, va="center", fontsize=8.5)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.22 * widest), xticks=[])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        drawn.legend(loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.0)
        return to_svg(drawn, plot, spoken, hovers)


def weights_plot(label: str, lines: Mapping[str, Sequence[tuple[int, Spread]]]) -> Markup:
    """Plot quality by trained weights, with 95 % intervals; one line for settings that differ only in size."""
    with drawing(width=8.0, height=3.6) as drawn:
        axes = titled(drawn.subplots(), f"{label} by trained weights", "trained weights", label)
        for number, (what, points) in enumerate(lines.items()):
            weights, means = [count for count, _ in points], [one.mean for _, one in points]
            errors = [0.0 if one.interval is None else one.interval[1] - one.mean for _, one in points]
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            axes.errorbar(weights, means, yerr=errors, color=colour, marker=marker, capsize=4, label=what)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: count_text(value))
        axes.margins(x=0.08, y=0.15)
        drawn.legend(loc="outside right upper", handlelength=2.6)
        cells = [f"{what} with {n:,} {mean_text(one, 3)}" for what, points in lines.items() for n, one in points]
        hovers = [
            Hover(axes, (n, n), (one.mean, one.mean), f"{what}, {n:,} weights: {mean_text(one, 3)}")
            for what, points in lines.items()
            for n, one in points
        ]
        return to_svg(drawn, "sweep", f"{label} by trained weights: {'; '.join(cells)}", hovers)
