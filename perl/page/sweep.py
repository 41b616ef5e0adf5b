"""The page of a sweep: reward models by rank and placement of their adapters, beside full tuning."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl.files import write_whole
from perl.page.numbers import (
    GAP,
    Spread,
    bytes_text,
    count_text,
    decimal,
    seconds_text,
    signed,
    spread,
    spread_text,
)
from perl.page.plots import FG, MUTED, SERIES, Plot, drawing, titled, to_svg
from perl.page.render import filled
from perl.page.runs import Run
from perl.page.schema import RewardEval, RewardStage

QUALITIES: dict[str, tuple[str, Callable[[RewardEval], float | None]]] = {
    "auroc": ("AUROC", lambda card: card.auroc),
    "pairwise_accuracy": ("pairwise accuracy", lambda card: card.pairwise_accuracy),
    "accuracy": ("accuracy", lambda card: card.accuracy),
}
COPIES = 4
"""A weight that learns is kept with its gradient and Adam's two moments, all of one dtype."""
CLOSE = 0.01
"""A quality this little below full tuning's is called as good."""
MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Cell:
    """The runs of one setting, one a seed. No rank and no targets: full tuning."""

    targets: str | None
    rank: int | None
    runs: tuple[Run, ...]

    @property
    def stages(self) -> list[RewardStage]:
        """The reward stages."""
        return [run.report.stages.reward for run in self.runs if run.report.stages.reward is not None]

    @property
    def name(self) -> str:
        """In words."""
        return "full tuning" if self.targets is None else f"{self.targets}, rank {self.rank}"

    @property
    def trained_parameters(self) -> int:
        """Weights that learn, the head's among them."""
        return self.stages[0].trainable_parameters

    @property
    def trained_bytes(self) -> float | None:
        """Of weights that learn, their gradients and Adam's two moments; None where weights were not measured."""
        memory = self.stages[0].memory
        weights = (
            memory["load"].kinds.get("base_weights" if self.targets is None else "adapters") if memory else None
        )
        return None if weights is None else COPIES * weights

    def over_seeds(self, figure: Callable[[RewardStage], float | None]) -> Spread | None:
        """A figure's mean and standard deviation."""
        return spread(figure(stage) for stage in self.stages)

    def quality(self, key: str) -> Spread | None:
        """One of `QUALITIES`."""
        return self.over_seeds(lambda stage: QUALITIES[key][1](stage.eval))


@dataclass(frozen=True)
class Sweep:
    """All cells of a sweep: those with adapters by targets and rank, then full tuning if it was run."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def seeds(self) -> int:
        """Runs of each cell."""
        return len(self.cells[0].runs)

    @property
    def full(self) -> Cell | None:
        """Full tuning, if it was run."""
        return next((cell for cell in self.cells if cell.targets is None), None)

    @property
    def keys(self) -> list[str]:
        """The qualities that every cell has; the first one is what the model was trained for."""
        keys = [key for key in QUALITIES if all(cell.quality(key) is not None for cell in self.cells)]
        compared = self.cells[0].stages[0].eval.compared
        return sorted(keys, key=lambda key: key != "pairwise_accuracy") if compared else keys

    @property
    def head(self) -> tuple[str, ...]:
        """Of the table."""
        first, *others = (QUALITIES[key][0] for key in self.keys)
        behind = ["less full tuning's"] if self.full else []
        return ("adapters on", "rank", first, *behind, *others, "trained", "their memory", "peak", "time")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Of the table, a cell each."""
        return [self._row(cell) for cell in self.cells]

    def _row(self, cell: Cell) -> tuple[str, ...]:
        first, *others = (spread_text(cell.quality(key), 3) for key in self.keys)
        behind = []
        if self.full is not None:
            difference = self.behind(cell)
            behind = ["" if difference is None else _signed_spread(difference)]
        peak, seconds = cell.over_seeds(lambda s: s.peak_memory_bytes), cell.over_seeds(lambda s: s.seconds)
        return (
            "full tuning" if cell.targets is None else cell.targets,
            "" if cell.rank is None else str(cell.rank),
            first,
            *behind,
            *others,
            count_text(cell.trained_parameters),
            "" if cell.trained_bytes is None else bytes_text(cell.trained_bytes),
            "" if peak is None else bytes_text(peak.mean),
            "" if seconds is None else seconds_text(seconds.mean),
        )

    def behind(self, cell: Cell) -> Spread | None:
        """The first quality less full tuning's, seed by seed; None of full tuning itself, or without it."""
        if self.full is None or cell.targets is None:
            return None
        value = QUALITIES[self.keys[0]][1]
        pairs = zip(cell.stages, self.full.stages, strict=True)
        differences = [(value(one.eval), value(other.eval)) for one, other in pairs]
        return spread(one - other for one, other in differences if one is not None and other is not None)

    def share(self, cell: Cell) -> float | None:
        """Its trained memory as a share of full tuning's."""
        if self.full is None or cell.trained_bytes is None or not self.full.trained_bytes:
            return None
        return cell.trained_bytes / self.full.trained_bytes

    @property
    def bottom_line(self) -> str:
        """The leanest setting that is as good as full tuning; or, without it, the best one."""
        what = QUALITIES[self.keys[0]][0]
        if self.full is None:
            best = max(self.cells, key=lambda cell: _mean(cell.quality(self.keys[0])))
            return f"The best mean {what} is that of {best.name}: {spread_text(best.quality(self.keys[0]), 3)}."
        adapters = sorted((c for c in self.cells if c.targets is not None), key=lambda c: c.trained_parameters)
        for cell in adapters:
            difference = self.behind(cell)
            if difference is not None and difference.mean >= -CLOSE:
                share = self.share(cell)
                memory = "" if share is None else f", with {100 * share:.2g}{GAP}% of its trained memory"
                return (
                    f"The leanest setting whose {what} is at most {CLOSE} below full tuning's is {cell.name}: "
                    f"{_signed_spread(difference)}{memory}."
                )
        return f"No setting comes within {CLOSE} of full tuning's {what}."

    def as_json(self) -> dict[str, Any]:
        """The table's figures."""
        return {
            "name": self.name,
            "seeds": [run.report.seed for run in self.cells[0].runs],
            "spread": "sample standard deviation over seeds",
            "bottom_line": self.bottom_line,
            "rows": [self._figures(cell) for cell in self.cells],
        }

    def _figures(self, cell: Cell) -> dict[str, Any]:
        spreads = {key: cell.quality(key) for key in self.keys}
        spreads["less_full"] = self.behind(cell)
        spreads["seconds"] = cell.over_seeds(lambda stage: stage.seconds)
        return {
            "targets": cell.targets or "full",
            "rank": cell.rank,
            "trainable_parameters": cell.trained_parameters,
            "trained_memory_bytes": cell.trained_bytes,
            "peak_memory_bytes": _mean(cell.over_seeds(lambda stage: stage.peak_memory_bytes)),
            **{key: None if value is None else vars(value) for key, value in spreads.items()},
        }


def _mean(value: Spread | None) -> float:
    return float("-inf") if value is None else value.mean


def _signed_spread(value: Spread) -> str:
    return (
        signed(value.mean, 3) if value.sd is None else f"{signed(value.mean, 3)}{GAP}±{GAP}{decimal(value.sd, 3)}"
    )


def write_sweep(found: Sweep, file: Path) -> Path:
    """Write the page of a sweep; return the file."""
    runs = [(run.path.name, cell.name, run.report.seed) for cell in found.cells for run in cell.runs]
    first = found.cells[0].runs[0]
    content = {
        "sweep": found,
        "plots": [_plot(found, key) for key in found.keys],
        "floor": _floor(found),
        "runs": runs,
        "n": found.cells[0].stages[0].eval.n,
        "gold": found.cells[0].stages[0].eval.against == "gold",
        "first": first,
    }
    write_whole(file, filled("sweep.html.j2", content))
    return file


def _floor(found: Sweep) -> str:
    """What counting words comes to on the same answers."""
    floors = [stage.eval.floor for stage in found.cells[0].stages]
    value = spread(floor.value for floor in floors if floor is not None)
    if value is None:
        return ""
    kind = next(floor.figure for floor in floors if floor is not None)
    return f"TF-IDF with logistic regression has {QUALITIES[kind][0]} {spread_text(value, 3)} on the same answers."


def _plot(found: Sweep, key: str) -> Plot:
    """A quality by rank, a line for each placement, full tuning as a band."""
    label = QUALITIES[key][0]
    label = label[0].upper() + label[1:]
    places: list[str] = list(dict.fromkeys(cell.targets for cell in found.cells if cell.targets is not None))
    ranks = sorted({cell.rank for cell in found.cells if cell.rank is not None})
    with drawing() as drawn:
        axes = titled(drawn.subplots(), f"{label} by rank", "rank", label)
        for number, place in enumerate(places):
            cells = [cell for cell in found.cells if cell.targets == place]
            values = [cell.quality(key) for cell in cells]
            known = [(cell.rank, value) for cell, value in zip(cells, values, strict=True) if value is not None]
            axes.errorbar(
                [ranks.index(rank) + 0.08 * (number - (len(places) - 1) / 2) for rank, _ in known if rank],
                [value.mean for _, value in known],
                yerr=[value.sd or 0.0 for _, value in known],
                color=SERIES[number],
                marker=MARKERS[number],
                markersize=5.5,
                linewidth=1.8,
                capsize=4,
                label=place,
            )
        full = None if found.full is None else found.full.quality(key)
        if full is not None:
            axes.axhline(full.mean, color=FG, linewidth=1.4, linestyle=(0, (5, 2)), label="full tuning")
            sd = full.sd or 0.0
            axes.axhspan(full.mean - sd, full.mean + sd, color=MUTED, alpha=0.18, linewidth=0)
        axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        axes.margins(x=0.08, y=0.15)
        drawn.legend(loc="outside upper left", ncols=3, handlelength=2.6)
        spoken = "; ".join(f"{cell.name} {spread_text(cell.quality(key), 3)}" for cell in found.cells)
        svg = to_svg(drawn, f"sweep-{key}", f"{label} by rank: {spoken}")
    return Plot(svg, f"{label} on held-out answers. {_how(found.seeds, found.full is not None)}")


def _how(seeds: int, full: bool) -> str:
    if seeds == 1:
        return "One seed each: differences may be chance."
    band = ", and so does the band around full tuning" if full else ""
    return f"Bars show one standard deviation over {seeds} seeds to either side{band}."
