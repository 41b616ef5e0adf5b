"""Plots of a policy: reward and gold by √KL, the distribution of rewards, and the trust region's steps."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from perl.report.charts import MARKERS, bin_hovers, step_hovers
from perl.report.numbers import decimal, plain
from perl.report.outcome import Curve, curve
from perl.report.runs import Group, Series
from perl.report.svg import FG, MUTED, SERIES, Hover, Plot, drawing, titled, to_svg
from perl.rl.results import RlEval

POINTS = 80
"""Maximum number of steps of a run that are drawn against √KL."""
BEST_OF_N = " Crosses: best of n completions of the policy before RL, which needs no training."
ROOT_KL = "How far the policy has moved from its start, and what it gained (as in Gao et al. 2022)."
WITH_GOLD = (
    "While both rise, the reward is a good guide; where the reward rises and gold falls, the policy exploits "
    "errors in its reward."
)
WITHOUT_GOLD = "These data have no gold judge, so only the reward is drawn."
ROOT_KL_MARKS = (
    "Points: training steps, smoothed, later ones more opaque. Diamonds: held-out prompts before and after RL."
)


def root_kl_plot(groups: Sequence[Group], name: str, matched_kl: float | None = None) -> Plot | None:
    """Plot reward and, below it, the gold judge's share against √KL; None unless each group has a curve."""
    curves = [[one for run in group.runs if (one := curve(run.metrics["policy"]))] for group in groups]
    if not all(curves):
        return None
    has_gold = any(np.isfinite(one.gold).any() for members in curves for one in members)
    with drawing(height=5.0 if has_gold else 2.75) as drawn:
        panels = drawn.subplots(2 if has_gold else 1, 1, sharex=True, squeeze=False)[:, 0]
        hovers: list[Hover] = []
        for group, members, colour, marker in zip(groups, curves, SERIES, MARKERS, strict=False):
            hovers += _scatter(panels[0], [(one, one.reward) for one in members], colour, marker)
            if has_gold:
                hovers += _scatter(panels[1], [(one, 100 * one.gold) for one in members], colour, marker)
            for rl in group.rl:
                label = group.label if rl is group.rl[0] else None
                hovers += _held_out(panels[0], rl.kl, rl.reward_before, rl.reward_after, colour, label)
                if has_gold and rl.gold_before is not None and rl.gold_after is not None:
                    hovers += _held_out(panels[1], rl.kl, 100 * rl.gold_before, 100 * rl.gold_after, colour)
                hovers += _best_of_n(panels, rl)
        for axes in panels:
            axes.margins(y=0.12)  # room for the labels of best-of-n
        titled(panels[0], "Reward (what RL raised)", "", "reward")
        if has_gold:
            titled(panels[1], "Gold judge (never seen in training)", "", "completions found right, %")
        if matched_kl is not None:
            for axes in panels:
                axes.axvline(
                    max(matched_kl, 0.0) ** 0.5, color=FG, linewidth=1.0, linestyle=":", label="matched KL"
                )
        panels[-1].set_xlabel("√KL from the reference (KL in nats per completion)")
        if len(groups) > 1:
            panels[0].legend(loc="lower right")
        svg = to_svg(drawn, name, f"Reward{' and gold judge' if has_gold else ''} against √KL", hovers)
    crosses = any(rl.best_of_n for group in groups for rl in group.rl)
    marks = f"{ROOT_KL_MARKS}{BEST_OF_N if crosses else ''}"
    return Plot(svg, f"{ROOT_KL} {WITH_GOLD if has_gold else WITHOUT_GOLD} {marks}", tall=has_gold)


def _point(axes: Axes, what: str, kl: float, value: float) -> Hover:
    x = max(kl, 0.0) ** 0.5
    return Hover(axes, (x, x), (value, value), f"{what}: {plain(value)} at KL {plain(kl)}")


def _scatter(axes: Axes, curves: Sequence[tuple[Curve, Series]], colour: str, marker: str) -> Iterator[Hover]:
    for one, values in curves:
        chosen = np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))
        chosen = chosen[np.isfinite(values[chosen])]
        x, shade = np.sqrt(np.maximum(one.kl[chosen], 0.0)), 0.15 + 0.75 * chosen / max(len(values) - 1, 1)
        axes.scatter(x, values[chosen], s=14, alpha=shade, color=colour, marker=marker, linewidths=0)
        yield from (_point(axes, f"step {step + 1}", one.kl[step], values[step]) for step in chosen)


def _best_of_n(panels: Iterable[Axes], rl: RlEval) -> Iterator[Hover]:
    """Draw best-of-n of the policy before RL, each point labelled with its n."""
    for one in rl.best_of_n or ():
        x, values = one.kl**0.5, [one.reward, None if one.gold is None else 100 * one.gold]
        for axes, y in zip(panels, values, strict=False):
            if y is not None:
                axes.plot([x], [y], "x", color=FG, markersize=6, zorder=6)
                number = axes.annotate(str(one.n), (x, y), (-4, 4), textcoords="offset points")
                number.set(ha="right", fontsize=8.5, zorder=7)
                yield _point(axes, f"best of {one.n}", one.kl, y)


def _held_out(
    axes: Axes, kl: float, before: float, after: float, colour: str, label: str | None = None
) -> Iterator[Hover]:
    x, y = [0.0, max(kl, 0.0) ** 0.5], [before, after]
    axes.plot(x, y, "D", color=colour, markersize=6.5, markeredgecolor=FG, zorder=5, label=label)
    yield _point(axes, "held out, before RL", 0.0, before)
    yield _point(axes, "held out, after RL", kl, after)


def reward_histogram_plot(group: Group) -> Plot | None:
    """Plot histograms of the held-out prompts' mean rewards before and after RL, of all runs; None if unknown."""
    known = [one.reward_histogram for one in group.rl if one.reward_histogram is not None]
    if not known or any(one.edges != known[0].edges for one in known):
        return None
    with drawing() as drawn:
        axes = titled(drawn.subplots(), "Rewards of held-out prompts", "mean reward of a prompt", "prompts")
        told = []
        for end, colour in (("before", MUTED), ("after", SERIES[0])):
            counts = np.sum([getattr(one, end) for one in known], axis=0)
            axes.stairs(counts, known[0].edges, color=colour, linewidth=1.8, label=f"{end} RL")
            axes.stairs(counts, known[0].edges, color=colour, alpha=0.18, fill=True)
            told.append(counts)
        axes.set_ylim(0, 1.3 * max(1, *np.ravel(told)))  # room for the legend
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.legend(loc="upper left")
        words = [f"{before} before RL, {after} after" for before, after in zip(*told, strict=True)]
        spoken = "Histogram of the held-out prompts' mean rewards, before and after RL"
        svg = to_svg(drawn, "rewards", spoken, bin_hovers(axes, known[0].edges, words))
    return Plot(svg, "Whether all prompts changed a little, or some changed a lot.")


def trust_region_plot(group: Group) -> Plot | None:
    """Plot the KL of each step and its limit δ; None for runs without a trust region."""
    runs = [run.metrics["policy"] for run in group.runs if "step_kl" in run.metrics["policy"]]
    if not runs:
        return None
    kl, limit, backtracks = (
        np.concatenate([metrics[name] for metrics in runs]) for name in ("step_kl", "step_kl_limit", "backtracks")
    )
    steps = np.concatenate([np.arange(1, len(metrics["step_kl"]) + 1) for metrics in runs])
    taken, shortened = np.isfinite(kl), int((backtracks > 0).sum())
    with drawing() as drawn:
        axes = titled(drawn.subplots(), "KL of each step, and its limit δ", "step", "nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for chosen, colour, marker, words in (
            (backtracks == 0, SERIES[0], "o", "full step"),
            (backtracks > 0, SERIES[1], "^", "shortened"),
        ):
            axes.plot(steps[chosen], kl[chosen], marker, color=colour, markersize=4, label=words)
        axes.plot(steps[taken], limit[taken], color=FG, linewidth=1.0, linestyle=(0, (4, 3)), label="δ")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
        spoken = f"KL of each step: at most {decimal(np.nanmax(kl))} nats per token, δ {decimal(np.nanmax(limit))}"
        hovers = step_hovers(axes, "KL", runs[0]["step_kl"])
        svg = to_svg(drawn, "steps-policy-step_kl", spoken, hovers)
    tried = f"{int(np.nansum(backtracks))} backtracks in total"
    return Plot(
        svg, f"Over the whole vocabulary. {shortened} of {int(taken.sum())} steps were shortened, {tried}."
    )
