"""The plots: training by step and by √KL, the reward model, costs, and a sweep's qualities by trained weights."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from perl.measure.metrics import ReliabilityBin
from perl.measure.probe import PHASES
from perl.measure.reward_model_card import RewardModelCard
from perl.report.numbers import Spread, bytes_text, count_text, decimal, mean_text, percent, seconds_text
from perl.report.outcome import Curve, curve, smooth, window
from perl.report.runs import Group, Series
from perl.report.svg import BG, FG, MUTED, SERIES, Plot, drawing, titled, to_svg
from perl.report.words import STAGE

KINDS = {
    "base_weights": "base weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "kv_cache": "KV cache",
}
LABEL_ROOM = 0.0235
"""A segment is labelled if it has this share of the widest bar for each letter."""
MARKERS = ("o", "s", "^", "D")
POINTS = 120
"""Steps of a run that are drawn against √KL, at most."""
ROOT_KL = "How far the policy has moved from where it began, and what it gained by that (as in Gao et al. 2022)."
WITH_GOLD = (
    "While both rise the reward leads the right way; where the reward rises and gold falls, the policy exploits "
    "mistakes of its reward."
)
WITHOUT_GOLD = "There is no gold judge in this data, so only the reward is drawn."
ROOT_KL_MARKS = (
    "Points: steps of training, smoothed, later ones stronger. Diamonds: held-out prompts, before RL (left) and "
    "after it."
)
Bar = tuple[str, Mapping[str, float], str]
"""A row's label, its segments by name, and what they come to."""


def step_plot(
    group: Group, role: str, metric: str, title: str, unit: str, ends: Sequence[Spread | None] = ()
) -> Plot | None:
    """A metric over training steps; None if no run has it.

    Args:
        ends: the held-out means before and after training, drawn as lines across.
    """
    known = [values for run in group.runs if (values := run.metrics[role].get(metric)) is not None]
    series = [values for values in known if np.isfinite(values).any()]
    if not series:
        return None
    length = min(len(values) for values in series)
    steps, smoothed = np.arange(1, length + 1), np.array([smooth(values)[:length] for values in series])
    with drawing() as drawn:
        axes = titled(drawn.subplots(), title, "step", unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        if metric == "loss":
            axes.set_ylim(0, 1.1 * np.nanmax([np.nanmax(values) for values in series]))
        if len(series) == 1:
            axes.plot(steps, series[0], "o", color=MUTED, markersize=2.6, alpha=0.55, markeredgewidth=0)
            caption = f"Dots: single steps. Line: their mean over {window(length)} steps."
        else:
            axes.plot(steps, smoothed.T, color=MUTED, linewidth=0.9, alpha=0.65)
            caption = f"Thin lines: each of {len(series)} seeds, smoothed. Thick line: their mean."
        mean = smoothed.mean(axis=0)
        axes.plot(steps, mean, color=SERIES[0], linewidth=2.4)
        for end, words in zip(ends, ("before", "after"), strict=False):
            if end is not None:
                axes.axhline(end.mean, color=FG, linewidth=1.0, linestyle=(0, (4, 3)))
                across = axes.get_yaxis_transform()
                axes.text(1, end.mean, words, transform=across, ha="right", va="bottom", fontsize=8.5)
        spoken = f"{title}: from {decimal(mean[0])} to {decimal(mean[-1])} ({unit})"
        svg = to_svg(drawn, f"steps-{role}-{metric}", spoken)
    return Plot(svg, caption + (" Dashed: held-out prompts before and after RL." if any(ends) else ""))


def trust_region_plot(group: Group) -> Plot | None:
    """The KL of each step against δ; None of runs without a trust region."""
    runs = [run.metrics["policy"] for run in group.runs if "step_kl" in run.metrics["policy"]]
    if not runs:
        return None
    kl, limit, backtracks = (
        np.concatenate([metrics[name] for metrics in runs]) for name in ("step_kl", "step_kl_limit", "backtracks")
    )
    steps = np.concatenate([np.arange(1, len(metrics["step_kl"]) + 1) for metrics in runs])
    taken, shortened = np.isfinite(kl), int((backtracks > 0).sum())
    with drawing() as drawn:
        axes = titled(drawn.subplots(), "KL of each step, and its limit δ", "step", "nats a token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for chosen, colour, marker, words in (
            (backtracks == 0, SERIES[0], "o", "whole"),
            (backtracks > 0, SERIES[1], "^", "shortened"),
        ):
            axes.plot(steps[chosen], kl[chosen], marker, color=colour, markersize=4, label=words)
        axes.plot(steps[taken], limit[taken], color=FG, linewidth=1.0, linestyle=(0, (4, 3)), label="δ")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
        spoken = f"KL of each step: at most {decimal(np.nanmax(kl))} nats a token, δ {decimal(np.nanmax(limit))}"
        svg = to_svg(drawn, "steps-policy-step_kl", spoken)
    tried = f"{int(np.nansum(backtracks))} backtracks in all"
    return Plot(
        svg, f"Over the whole vocabulary. {shortened} of {int(taken.sum())} steps were shortened, {tried}."
    )


def root_kl_plot(groups: Sequence[Group], name: str, matched_kl: float | None = None) -> Plot | None:
    """Reward, and the gold judge's share under it, against √KL; None unless each group has a curve."""
    curves = [[one for run in group.runs if (one := curve(run.metrics["policy"]))] for group in groups]
    if not all(curves):
        return None
    has_gold = any(np.isfinite(one.gold).any() for members in curves for one in members)
    with drawing(height=5.0 if has_gold else 2.75) as drawn:
        panels = drawn.subplots(2 if has_gold else 1, 1, sharex=True, squeeze=False)[:, 0]
        for group, members, colour, marker in zip(groups, curves, SERIES, MARKERS, strict=False):
            _scatter(panels[0], [(one, one.reward) for one in members], colour, marker)
            for rl in group.rl:
                label = group.label if rl is group.rl[0] else None
                _held_out(panels[0], rl.kl, rl.reward_before, rl.reward_after, colour, label)
                if has_gold and rl.gold_before is not None and rl.gold_after is not None:
                    _held_out(panels[1], rl.kl, 100 * rl.gold_before, 100 * rl.gold_after, colour)
            if has_gold:
                _scatter(panels[1], [(one, 100 * one.gold) for one in members], colour, marker)
        titled(panels[0], "Reward (what RL raised)", "", "reward")
        if has_gold:
            titled(panels[1], "Gold judge (never seen in training)", "", "completions found right, %")
        if matched_kl is not None:
            for axes in panels:
                axes.axvline(
                    max(matched_kl, 0.0) ** 0.5, color=FG, linewidth=1.0, linestyle=":", label="matched KL"
                )
        panels[-1].set_xlabel("√KL from the reference (KL in nats a completion)")
        if len(groups) > 1:
            panels[0].legend(loc="lower right")
        svg = to_svg(drawn, name, f"Reward{' and gold judge' if has_gold else ''} against √KL")
    return Plot(svg, f"{ROOT_KL} {WITH_GOLD if has_gold else WITHOUT_GOLD} {ROOT_KL_MARKS}")


def _scatter(axes: Axes, curves: Sequence[tuple[Curve, Series]], colour: str, marker: str) -> None:
    for one, values in curves:
        chosen = np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))
        chosen = chosen[np.isfinite(values[chosen])]
        x, shade = np.sqrt(np.maximum(one.kl[chosen], 0.0)), 0.15 + 0.75 * chosen / max(len(values) - 1, 1)
        axes.scatter(x, values[chosen], s=14, alpha=shade, color=colour, marker=marker, linewidths=0)


def _held_out(axes: Axes, kl: float, before: float, after: float, colour: str, label: str | None = None) -> None:
    x, y = [0.0, max(kl, 0.0) ** 0.5], [before, after]
    axes.plot(x, y, "D", color=colour, markersize=6.5, markeredgecolor=FG, zorder=5, label=label)


def reliability_plot(card: RewardModelCard) -> Plot:
    """Observed share against the probability given, a point a bin; as it is, and scaled where that is known."""
    scaling = card.calibration
    before, after = scaling.reliability_before, scaling.reliability_after
    with drawing(height=2.9) as drawn:
        axes = titled(drawn.subplots(), "Reliability", f"probability given of {scaling.of}", "share observed")
        axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=MUTED, linewidth=1.2)
        axes.text(0.98, 0.06, "dashed: perfectly calibrated", ha="right", color=MUTED, fontsize=8.5)
        _points(axes, before, MUTED, "o", "as it is")
        if after is not None:
            _points(axes, after, SERIES[0], "D", "scaled")
        axes.legend(loc="upper left")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        pairs = "; ".join(f"{one.probability:.2f} given, {one.share:.2f} observed" for one in after or before)
        svg = to_svg(drawn, "reliability", f"Reliability diagram{' (scaled)' if after else ''}: {pairs}")
    fewest, most = min(one.n for one in before), max(one.n for one in before)
    each = f"{most}" if fewest == most else f"{fewest} to {most}"
    sure = f"Below the dashed line the model is too sure of {scaling.of}, above it not sure enough."
    return Plot(svg, f"A point for {each} answers of like probability. {sure}")


def _points(axes: Axes, bins: Sequence[ReliabilityBin], colour: str, marker: str, label: str) -> None:
    predicted, observed = [one.probability for one in bins], [one.share for one in bins]
    axes.plot(predicted, observed, color=colour, marker=marker, markersize=5, markeredgecolor=BG, label=label)


def scores_plot(card: RewardModelCard) -> Plot | None:
    """How the scores of answers rated up and down are spread; None of a histogram that does not fit together."""
    counts = card.score_histogram
    if not len(counts.edges) - 1 == len(counts.up) == len(counts.down) > 0:
        return None
    edges = np.asarray(counts.edges)
    with drawing(height=2.9) as drawn:
        axes = titled(drawn.subplots(), "Scores", "score (log-odds of a thumb up)", "answers")
        for sign, values, colour, y in ((1, counts.up, SERIES[0], 0.92), (-1, counts.down, SERIES[1], 0.03)):
            heights = sign * np.asarray(values)
            axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=colour, edgecolor=BG)
            words = f"rated {'up' if sign > 0 else 'down'}"
            axes.text(0.02, y, words, transform=axes.transAxes, fontweight="bold", fontsize=9)
        axes.axhline(0, color=FG, linewidth=1.0)
        top = 1.25 * max(*counts.up, *counts.down, 1)
        axes.set_ylim(-top, top)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
        svg = to_svg(drawn, "scores", "Histogram of scores: answers rated up above the line, rated down below")
    return Plot(svg, "The less the two heaps overlap sideways, the better the model tells good answers from bad.")


def cost_plots(groups: Sequence[Group]) -> list[Plot]:
    """Of each group's first run: peak memory by stage and phase, on one scale; time by stage and phase."""
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
        svg = _bars(bars, list(KINDS.values()), f"memory-{group.tuning}", spoken, widest)
        memory.append(Plot(svg, f"Peak memory of each phase {under}."))
        bars = []
        for name, stage in stages.items():
            seconds = {str(phase): seconds for phase, seconds in stage.phase_seconds.items()}
            bars.append((STAGE[name], seconds, seconds_text(sum(seconds.values()))))
        spoken = f"Time by phase {under}: {'; '.join(f'{label}: {_shares(one)}' for label, one, _ in bars)}."
        longest = max(sum(one.values()) for _, one, _ in bars)
        time.append(Plot(_bars(bars, PHASES, f"time-{group.tuning}", spoken, longest), spoken))
    return memory + time


def _shares(seconds: Mapping[str, float]) -> str:
    """As in generate 41 %, update 50 %."""
    total = max(sum(seconds.values()), 1e-9)
    return ", ".join(f"{name} {percent(value / total)}" for name, value in seconds.items() if value > 0)


def _bars(bars: Sequence[Bar], order: Sequence[str], plot: str, spoken: str, widest: float) -> Markup:
    names = [name for name in order if any(segments.get(name, 0) > 0 for _, segments, _ in bars)]
    columns = 4 if sum(map(len, names)) < 30 else 3
    with drawing(height=0.25 + 0.3 * len(bars) + 0.24 * -(-len(names) // columns)) as drawn:
        axes = drawn.subplots()
        starts = np.zeros(len(bars))
        for name in names:
            widths = np.array([segments.get(name, 0.0) for _, segments, _ in bars])
            colour = SERIES[order.index(name)]  # the same in all plots
            axes.barh(range(len(bars)), widths, 0.72, left=starts, color=colour, edgecolor=BG, label=name)
            for row, width in enumerate(widths):
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
        return to_svg(drawn, plot, spoken)


def weights_plot(name: str, label: str, lines: Mapping[str, Sequence[tuple[int, Spread]]]) -> Markup:
    """A quality by the number of trained weights, with 95 % intervals; a line for what differs in size alone."""
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
        return to_svg(drawn, name, f"{label} by trained weights: {'; '.join(cells)}")
