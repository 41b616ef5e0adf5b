"""Plots of training: figures over steps, and reward against √KL."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from perl.page.matched import Curve, at_kl, curve, smooth, window
from perl.page.numbers import decimal
from perl.page.outcome import Group
from perl.page.plots import BG, FG, MUTED, SERIES, Plot, drawing, titled, to_svg
from perl.page.runs import Series

DASHES = ("-", (0, (5, 2)))
"""Solid for the first tuning, dashed for the second."""
KL_POINTS = 60
SEED_ALPHA = 0.65
"""Single seeds stand back behind their mean."""


def step_plot(group: Group, role: str, figure: str, title: str, unit: str) -> Plot | None:
    """A figure over training steps; None if no run has one.

    One run: a dot a step and the moving mean. Several: each run's moving mean thin, and the mean of those thick.
    """
    found = [run.metrics[role].get(figure) for run in group.runs]
    series = [values for values in found if values is not None and np.isfinite(values).any()]
    if not series:
        return None
    smoothed = [smooth(values) for values in series]
    with drawing() as drawn:
        axes = titled(drawn.subplots(), title, "step", unit)
        if len(series) == 1:
            steps = np.arange(1, len(series[0]) + 1)
            axes.plot(steps, series[0], "o", color=MUTED, markersize=2.6, alpha=0.55, markeredgewidth=0)
            axes.plot(steps, smoothed[0], color=SERIES[0], linewidth=2.2)
        else:
            for values in smoothed:
                axes.plot(np.arange(1, len(values) + 1), values, color=MUTED, linewidth=0.9, alpha=SEED_ALPHA)
            mean = _mean(smoothed)
            axes.plot(np.arange(1, len(mean) + 1), mean, color=SERIES[0], linewidth=2.6)
        axes.margins(x=0.02)
        ends = [float(values[np.isfinite(values)][-1]) for values in smoothed]
        starts = [float(values[np.isfinite(values)][0]) for values in smoothed]
        spoken = f"{title}: from {decimal(float(np.mean(starts)))} to {decimal(float(np.mean(ends)))} ({unit})"
        svg = to_svg(drawn, f"steps-{role}-{figure}", spoken)
    return Plot(svg, _how_drawn(len(series), len(series[0])))


def _how_drawn(runs: int, steps: int) -> str:
    if runs == 1:
        return f"Dots: single steps. Line: their mean over {window(steps)} steps."
    return f"Thin lines: each of {runs} seeds, smoothed. Thick line: their mean, as far as all of them go."


def _mean(series: Sequence[Series]) -> Series:
    length = min(len(values) for values in series)
    mean: Series = np.mean([values[:length] for values in series], axis=0)
    return mean


def proxy_gold_plot(group: Group) -> Plot | None:
    """Reward and, under it, the gold judge's share, against √KL; None where no curve is long enough."""
    curves = [one for one in (curve(run.metrics["policy"]) for run in group.runs) if one is not None]
    if not curves:
        return None
    has_gold = any(np.isfinite(one.gold).any() for one in curves)
    points = [one for one in group.rl if one.gold_before is not None and one.gold_after is not None]
    panels = 2 if has_gold or points else 1
    with drawing(height=2.75 if panels == 1 else 5.0) as drawn:
        axes = drawn.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        axes[0].set_title("Reward (what RL raised)")
        axes[0].set_ylabel("reward")
        _against_root_kl(axes[0], [(one.kl, one.reward) for one in curves], SERIES[0])
        for one in group.rl:
            _held_out(axes[0], one.reward_before, one.reward_after, one.kl)
        if panels == 2:
            axes[1].set_title("Gold judge (never seen in training)")
            axes[1].set_ylabel("answers found right, %")
            if has_gold:
                _against_root_kl(axes[1], [(one.kl, 100 * one.gold) for one in curves], SERIES[1])
            for one in points:
                ends = (100 * (one.gold_before or 0.0), 100 * (one.gold_after or 0.0))
                _held_out(axes[1], *ends, one.kl, joined=not has_gold)
        axes[-1].set_xlabel("√KL from the reference (KL in nats an answer)")
        svg = to_svg(drawn, "root-kl", "Reward, and the gold judge's share of right answers, against √KL")
    return Plot(svg, _proxy_gold_words(panels == 2))


def _proxy_gold_words(has_gold: bool) -> str:
    words = "How far the policy has moved from where it began, and what it gained by that (as in Gao et al. 2022)."
    if has_gold:
        words += (
            " While both rise the reward leads the right way; where the reward rises and gold falls, the policy "
        )
        words += "exploits mistakes of its reward."
    else:
        words += " There is no gold judge in this data, so only the reward is drawn."
    return f"{words} Diamonds: held-out prompts, before RL (left) and after; lines: answers sampled in training."


def _held_out(axes: Axes, first: float, last: float, kl: float, joined: bool = False) -> None:
    """The ends on held-out prompts; joined by a dotted line where there is no curve to see."""
    x = [0.0, max(kl, 0.0) ** 0.5]
    if joined:
        axes.plot(x, [first, last], linestyle=":", color=MUTED, linewidth=1.4)
        axes.margins(y=0.15)
    axes.plot(x, [first, last], "D", color=FG, markersize=5.5, markeredgecolor=BG, markeredgewidth=1.0, zorder=5)


def _against_root_kl(axes: Axes, curves: Sequence[tuple[Series, Series]], colour: str) -> None:
    """Each run's curve (thin if there are several) and their mean over the stretch of KL all reached (thick)."""
    several = len(curves) > 1
    for kl, values in curves:
        known = np.isfinite(values)
        axes.plot(
            np.sqrt(np.maximum(kl[known], 0.0)),
            values[known],
            color=MUTED if several else colour,
            linewidth=0.9 if several else 2.2,
            alpha=SEED_ALPHA if several else 1.0,
        )
    if several:
        axes.plot(*_mean_over_kl(curves), color=colour, linewidth=2.6)


def _mean_over_kl(curves: Sequence[tuple[Series, Series]]) -> tuple[Series, Series]:
    """√KL and the mean over runs where each first reaches that KL, as far as all of them go."""
    known = [(kl[np.isfinite(values)], values[np.isfinite(values)]) for kl, values in curves]
    known = [(kl, values) for kl, values in known if len(kl)]
    low = max(0.0, max(float(kl[0]) for kl, _ in known))
    high = min(float(kl.max()) for kl, _ in known)
    roots = np.linspace(low**0.5, max(low, high) ** 0.5, KL_POINTS)
    rows = [[at_kl(kl, values, min(root**2, high)) for root in roots] for kl, values in known]
    mean: Series = np.mean(np.array(rows, dtype=np.float64), axis=0)
    return roots, mean


def tunings_plot(groups: Sequence[Group], matched_kl: float | None) -> Plot | None:
    """Reward against √KL under LoRA (solid) and full tuning (dashed); None unless both have curves."""
    curves: list[list[Curve]] = []
    for group in groups:
        found = (curve(run.metrics["policy"]) for run in group.runs)
        curves.append([one for one in found if one is not None])
    if len(curves) < 2 or not all(curves):
        return None
    with drawing(height=3.0) as drawn:
        axes = titled(drawn.subplots(), "Reward under both tunings", "√KL (KL in nats an answer)", "reward")
        for group, members, dash, colour in zip(groups, curves, DASHES, SERIES, strict=False):
            for one in members:
                x = np.sqrt(np.maximum(one.kl, 0.0))
                axes.plot(x, one.reward, linestyle=dash, color=colour, linewidth=0.9, alpha=0.7)
            x, y = _mean_over_kl([(one.kl, one.reward) for one in members])
            axes.plot(x, y, linestyle=dash, color=colour, linewidth=2.6, label=group.label)
        if matched_kl is not None:
            axes.axvline(max(matched_kl, 0.0) ** 0.5, color=FG, linewidth=1.0, linestyle=":", label="matched KL")
        axes.legend(loc="upper left", handlelength=3.2)
        svg = to_svg(drawn, "tunings", "Reward against √KL, LoRA solid and full tuning dashed")
    return Plot(
        svg, "Thin: each seed, smoothed. Thick: the mean of the seeds. Rewards of answers sampled in training."
    )
