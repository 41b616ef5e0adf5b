"""A sweep: reward models by rank and placement of their adapters, beside full tuning; its table and its page."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perl.measure.reward_model_card import RewardModelCard
from perl.report.charts import rank_plot
from perl.report.numbers import GAP, NONE, Spread, bytes_text, count_text, seconds_text, spread, spread_text
from perl.report.runs import Run
from perl.report.svg import Plot
from perl.report.templates import filled
from perl.results import RewardStage
from perl.system.files import write_whole

QUALITIES: dict[str, tuple[str, Callable[[RewardModelCard], float | None]]] = {
    "auroc": ("AUROC", lambda card: card.auroc),
    "pairwise_accuracy": ("pairwise accuracy", lambda card: card.pairwise_accuracy),
    "accuracy": ("accuracy", lambda card: card.accuracy),
}
COPIES = 4
"""A trainable weight, its gradient and Adam's two moments, all of one dtype."""
CLOSE = 0.01
"""A quality at most so much below full tuning's counts as good."""


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
    def rate(self) -> float | None:
        """The learning rate; None where the folder has no recipe."""
        rate = self.runs[0].section("reward").get("learning_rate")
        return rate if isinstance(rate, float) else None

    @property
    def name(self) -> str:
        """In words."""
        return "full tuning" if self.targets is None else f"{self.targets}, rank {self.rank}"

    @property
    def parameters(self) -> int:
        """Trainable ones, the head's among them."""
        return self.stages[0].trainable_parameters

    @property
    def trained_bytes(self) -> int:
        """Of trainable weights, their gradients and Adam's two moments."""
        return COPIES * self.stages[0].memory["load"].kinds["base_weights" if self.targets is None else "adapters"]

    def mean(self, cost: Callable[[RewardStage], float]) -> float:
        """Of a cost, over the seeds."""
        return sum(map(cost, self.stages)) / len(self.stages)

    def quality(self, key: str) -> Spread | None:
        """One of `QUALITIES`, over the seeds."""
        return spread(QUALITIES[key][1](stage.eval) for stage in self.stages)


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
    def columns(self) -> dict[str, Callable[[Cell], str]]:
        """Of the table: each head and the text of its cells."""
        columns: dict[str, Callable[[Cell], str]] = {
            "adapters on": lambda cell: cell.targets or "full tuning",
            "rank": lambda cell: "" if cell.rank is None else str(cell.rank),
        }
        if any(cell.rate is not None for cell in self.cells):
            columns["rate"] = lambda cell: NONE if cell.rate is None else f"{cell.rate:g}"
        for key in self.keys:
            columns[QUALITIES[key][0]] = lambda cell, key=key: spread_text(cell.quality(key), 3)  # type: ignore[misc]
            if key == self.keys[0] and self.full:
                columns["less full tuning's"] = lambda cell: spread_text(self.behind(cell), 3, sign=True)
        return columns | {
            "trained": lambda cell: count_text(cell.parameters),
            "their memory": lambda cell: bytes_text(cell.trained_bytes),
            "peak": lambda cell: bytes_text(cell.mean(lambda stage: stage.peak_memory_bytes)),
            "time": lambda cell: seconds_text(cell.mean(lambda stage: stage.seconds)),
        }

    def behind(self, cell: Cell) -> Spread | None:
        """The first quality less full tuning's, seed by seed; None of full tuning itself, or without it."""
        if self.full is None or cell.targets is None:
            return None
        value = QUALITIES[self.keys[0]][1]
        pairs = zip(cell.stages, self.full.stages, strict=True)
        differences = [(value(one.eval), value(other.eval)) for one, other in pairs]
        return spread(one - other for one, other in differences if one is not None and other is not None)

    @property
    def bottom_line(self) -> str:
        """The leanest setting that is as good as full tuning; or, without it, the best one."""
        what = QUALITIES[self.keys[0]][0]
        if self.full is None:
            known = [(value, cell) for cell in self.cells if (value := cell.quality(self.keys[0]))]
            value, best = max(known, key=lambda pair: pair[0].mean)
            return f"The best mean {what} is that of {best.name}: {spread_text(value, 3)}."
        for cell in sorted(self.cells, key=lambda cell: cell.parameters):
            difference = self.behind(cell)
            if difference is not None and difference.mean >= -CLOSE:
                share = 100 * cell.trained_bytes / self.full.trained_bytes
                return (
                    f"The leanest setting whose {what} is at most {CLOSE} below full tuning's is {cell.name}: "
                    f"{spread_text(difference, 3, sign=True)}, with {share:.2g}{GAP}% of its trained memory."
                )
        return f"No setting comes within {CLOSE} of full tuning's {what}."

    def as_json(self) -> dict[str, Any]:
        """The table's metrics."""
        return {
            "name": self.name,
            "seeds": [run.report.seed for run in self.cells[0].runs],
            "spread": "sample standard deviation over seeds",
            "bottom_line": self.bottom_line,
            "rows": [self._metrics(cell) for cell in self.cells],
        }

    def _metrics(self, cell: Cell) -> dict[str, Any]:
        spreads = {key: cell.quality(key) for key in self.keys} | {"less_full": self.behind(cell)}
        spreads["seconds"] = spread(stage.seconds for stage in cell.stages)
        return {
            "targets": cell.targets or "full",
            "rank": cell.rank,
            "learning_rate": cell.rate,
            "trainable_parameters": cell.parameters,
            "trained_memory_bytes": cell.trained_bytes,
            "peak_memory_bytes": cell.mean(lambda stage: stage.peak_memory_bytes),
            **{key: None if value is None else asdict(value) for key, value in spreads.items()},
        }


def write_sweep(sweep: Sweep, file: Path) -> Path:
    """Write the page of a sweep; return the file."""
    first = sweep.cells[0]
    baselines = [stage.eval.tfidf_baseline for stage in first.stages]
    tfidf = spread(baseline.value for baseline in baselines)
    content = {
        "sweep": sweep,
        "columns": list(sweep.columns),
        "rows": [[text(cell) for text in sweep.columns.values()] for cell in sweep.cells],
        "plots": [_plot(sweep, key) for key in sweep.keys],
        "tfidf": f"{QUALITIES[baselines[0].metric][0]} {spread_text(tfidf, 3)}" if tfidf else "",
        "runs": [(run.path.name, cell.name, run.report.seed) for cell in sweep.cells for run in cell.runs],
        "eval": first.stages[0].eval,
        "first": first.runs[0],
    }
    write_whole(file, filled("sweep.html.j2", content))
    return file


def _plot(sweep: Sweep, key: str) -> Plot:
    label = QUALITIES[key][0]
    label = label[0].upper() + label[1:]
    places: dict[str, dict[int, Spread]] = {}
    for cell in sweep.cells:
        if cell.targets is not None and cell.rank is not None and (value := cell.quality(key)) is not None:
            places.setdefault(cell.targets, {})[cell.rank] = value
    svg = rank_plot(f"sweep-{key}", label, places, sweep.full.quality(key) if sweep.full else None)
    band = ", and so does the band around full tuning" if sweep.full else ""
    bars = f"Bars show one standard deviation over {sweep.seeds} seeds to either side{band}."
    chance = "One seed each: differences may be chance."
    return Plot(svg, f"{label} on held-out answers. {bars if sweep.seeds > 1 else chance}")
