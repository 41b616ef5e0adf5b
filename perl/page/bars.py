"""Plots of cost: memory by phase and kind, time by phase."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes

from perl.page.numbers import bytes_text, percent, seconds_text
from perl.page.outcome import STAGE, Group
from perl.page.plots import BG, FG, HATCHES, SERIES, Plot, drawing, to_svg
from perl.page.runs import Run
from perl.page.schema import Stage

PHASES = ("load", "generate", "score", "update")
KINDS = {
    "base_weights": "base weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "kv_cache": "KV cache",
}
LABEL_ROOM = 0.025
"""A segment is labelled inside if it takes this much of the widest bar for each letter."""


@dataclass(frozen=True)
class Bar:
    """A row of segments, by name."""

    label: str
    segments: Mapping[str, float]
    total: str


def memory_bars(run: Run) -> list[Bar]:
    """A bar a stage and phase."""
    bars = []
    for name, stage in run.stages.items():
        memory = stage.memory or {}
        for phase in sorted(memory, key=_phase_order):
            one = memory[phase]
            segments = {KINDS.get(kind, kind): one.kinds[kind] for kind in sorted(one.kinds, key=_kind_order)}
            total = bytes_text(one.peak)
            bars.append(Bar(f"{STAGE[name]} · {phase}", segments or {"peak": one.peak}, total))
    return bars


def memory_plot(group: Group, widest: float) -> Plot | None:
    """Peak memory by stage and phase of the first run, what it consists of as segments; None if not measured.

    Args:
        group: the runs of one tuning.
        widest: bytes that the axis must hold, so that both tunings have the same.
    """
    bars = memory_bars(group.runs[0])
    if not bars:
        return None
    spoken = "; ".join(f"{bar.label} {bar.total}" for bar in bars)
    names = [name for name in KINDS.values() if any(bar.segments.get(name, 0) > 0 for bar in bars)]
    extra = {name for bar in bars for name in bar.segments if name not in KINDS.values()}
    svg = _bars(
        bars, [*names, *sorted(extra)], f"memory-{group.tuning}", f"Peak memory, {group.label}: {spoken}", widest
    )
    return Plot(svg, f"Peak memory of each phase under {_lower(group.label)}, seed {group.runs[0].report.seed}.")


def widest_memory(groups: Sequence[Group]) -> float:
    """The largest phase of any tuning's first run."""
    stages = [stage for group in groups for stage in group.runs[0].stages.values()]
    return max((one.peak for stage in stages for one in (stage.memory or {}).values()), default=1.0)


def time_plot(group: Group) -> Plot | None:
    """Time by stage and phase of the first run; None if not measured."""
    bars = [
        Bar(STAGE[name], {p: s for p in sorted(phases, key=_phase_order) if (s := phases[p]) > 0}, _total(stage))
        for name, stage in group.runs[0].stages.items()
        if (phases := stage.phase_seconds)
    ]
    if not bars:
        return None
    names = sorted({name for bar in bars for name in bar.segments}, key=_phase_order)
    shares = "; ".join(f"{bar.label}: {phase_words(bar.segments)}" for bar in bars)
    widest = max(sum(bar.segments.values()) for bar in bars)
    svg = _bars(bars, names, f"time-{group.tuning}", f"Time by phase. {shares}", widest)
    return Plot(svg, f"Time of each stage by phase, {_lower(group.label)}. {shares}.")


def _total(stage: Stage) -> str:
    return seconds_text(sum((stage.phase_seconds or {}).values()))


def phase_words(segments: Mapping[str, float]) -> str:
    """Shares of the phases, as in generate 41 %, update 50 %."""
    total = sum(segments.values())
    return ", ".join(f"{name} {percent(value / total)}" for name, value in segments.items())


def _bars(bars: Sequence[Bar], names: Sequence[str], plot: str, spoken: str, widest: float) -> Markup:
    columns = 4 if sum(map(len, names)) < 30 else 3
    rows = -(-len(names) // columns)  # of the legend
    with drawing(height=0.25 + 0.3 * len(bars) + 0.24 * rows) as drawn:
        axes = drawn.subplots()
        for place, name in enumerate(names):
            look = _look(name)
            colour, hatch = SERIES[look % len(SERIES)], HATCHES[look % len(HATCHES)]
            widths = [bar.segments.get(name, 0.0) for bar in bars]
            starts = [_before(bar, names[:place]) for bar in bars]
            axes.barh(
                range(len(bars)), widths, 0.72, left=starts, color=colour, hatch=hatch, edgecolor=BG, label=name
            )
            for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
                if width > LABEL_ROOM * widest * (len(name) + 1):
                    _label(axes, start + width / 2, row, name)
        for row, bar in enumerate(bars):
            axes.text(sum(bar.segments.values()) + 0.015 * widest, row, bar.total, va="center", fontsize=8.5)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * widest)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        drawn.legend(
            loc="outside upper left", ncols=columns, handlelength=2.2, handleheight=1.2, columnspacing=1.0
        )
        return to_svg(drawn, plot, spoken)


def _look(name: str) -> int:
    """A kind or phase looks the same in all plots."""
    for names in (list(KINDS.values()), list(PHASES)):
        if name in names:
            return names.index(name)
    return len(SERIES) - 1


def _before(bar: Bar, names: Sequence[str]) -> float:
    return sum(bar.segments.get(name, 0.0) for name in names)


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": BG, "edgecolor": "none"}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=FG, bbox=box)


def _phase_order(phase: str) -> tuple[int, str]:
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def _kind_order(kind: str) -> tuple[int, str]:
    return (list(KINDS).index(kind) if kind in KINDS else len(KINDS), kind)


def _lower(label: str) -> str:
    return label if label == "LoRA" else label.lower()
