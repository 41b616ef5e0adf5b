"""A sweep of one stage over several settings: quality, weights, memory and time of each, and the findings."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from perl.measure.rate_search import BestRates
from perl.recipe import StageName
from perl.report.charts import weights_plot
from perl.report.numbers import (
    NONE,
    Spread,
    bytes_text,
    count_text,
    decimal,
    mean_text,
    seconds_text,
    signed,
    spread,
)
from perl.report.outcome import curve, match
from perl.report.quality import Quality, qualities
from perl.report.runs import Run
from perl.report.svg import Plot
from perl.report.templates import filled
from perl.results import StageResult
from perl.runs.folder import STAGE_ROLE
from perl.sweep.setting import Setting
from perl.system.files import write_whole

PLACES = 3
"""Decimal places of a quality metric."""
DIRECTIONS = ("higher", "lower", "no difference shown", "one seed, may be chance")
"""What can be concluded from the interval of a difference."""


@dataclass(frozen=True)
class Cell:
    """The runs of one setting by seed, and its best learning rates if they were searched."""

    setting: Setting
    runs: Mapping[int, Run]
    searched: BestRates | None = None

    @property
    def searched_at_edge(self) -> bool:
        """Whether the best rate may be outside the range that was tried."""
        return self.searched is not None and self.searched.edge

    def mean(self, stage: StageName, cost: Callable[[StageResult], float]) -> float:
        """Return the mean of a cost over the seeds."""
        return sum(cost(run.stages[stage]) for run in self.runs.values()) / len(self.runs)


@dataclass(frozen=True)
class Sweep:
    """All settings of a sweep that have runs; the others are compared with the first one, seed by seed.

    Attributes:
        seeds: the seeds of each setting, except for runs that diverged.
        searched_on: the seeds that learning rates were searched on; empty: no search.
        at: the KL at which RL is evaluated; None: the largest that all runs reached.
    """

    name: str
    stage: StageName
    seeds: tuple[int, ...]
    searched_on: tuple[int, ...]
    cells: tuple[Cell, ...]
    at: float | None = None

    @property
    def qualities(self) -> list[Quality]:
        """The quality metrics of the first run; the first of them decides between settings."""
        return qualities(self.stage, next(iter(self.cells[0].runs.values())))

    @cached_property
    def kl(self) -> float:
        """KL for the comparison in nats per completion; 0 if nothing depends on it."""
        runs = [run for cell in self.cells for run in cell.runs.values()]
        matched = match([curve(run.metrics["policy"]) for run in runs]) if self.at is None else None
        return matched.kl if matched is not None else self.at or 0.0

    def quality(self, cell: Cell, quality: Quality) -> Spread | None:
        """Return a quality metric over the seeds."""
        kl = self.kl
        return spread(quality.value(run, kl) for run in cell.runs.values())

    def difference(self, cell: Cell) -> Spread | None:
        """Return the first quality minus the first setting's, seed by seed; None for the first setting itself."""
        first, quality, kl = self.cells[0], self.qualities[0], self.kl
        if cell is first:
            return None
        pairs = [(quality.value(run, kl), quality.value(first.runs[seed], kl)) for seed, run in self._pairs(cell)]
        return spread(one - other for one, other in pairs if one is not None and other is not None)

    def _pairs(self, cell: Cell) -> list[tuple[int, Run]]:
        return [(seed, run) for seed, run in cell.runs.items() if seed in self.cells[0].runs]

    def rate_ratio(self, cell: Cell) -> Spread | None:
        """Return log10 of the ratio of the best rate to the first setting's, over the seeds of the search."""
        own, first = cell.searched, self.cells[0].searched
        if cell is self.cells[0] or own is None or first is None:
            return None
        return spread(math.log10(one / other) for one, other in zip(own.rates, first.rates, strict=True))

    @property
    def sentences(self) -> list[str]:
        """What the runs show compared with the first setting: a direction only if the interval supports it."""
        name, first = self.qualities[0].name, self.cells[0].setting.words
        cells = self.cells[1:]
        said = _grouped(f"{_capital(name)} compared with {first}", self.difference, cells, _difference_text)
        return said + _grouped(f"Best learning rate compared with {first}", self.rate_ratio, cells, _ratio_text)

    @property
    def columns(self) -> dict[str, Callable[[Cell], str]]:
        """The columns of the table: each heading, and a function for the text of its cells."""
        shown: dict[str, Callable[[Cell], str]] = {"setting": lambda cell: cell.setting.words}
        shown["rate"] = self._rate_text
        for quality in self.qualities:
            shown[quality.name] = lambda cell, quality=quality: mean_text(self.quality(cell, quality), PLACES)  # type: ignore[misc]
            if quality is self.qualities[0]:
                shown["minus the first's"] = lambda cell: mean_text(self.difference(cell), PLACES, sign=True)
        return shown | {
            "trained": lambda cell: count_text(self.weights(cell)),
            "peak": lambda cell: bytes_text(cell.mean(self.stage, lambda stage: stage.peak_memory_bytes)),
            "per step": lambda cell: seconds_text(self.seconds(cell)),
        }

    def _rate_text(self, cell: Cell) -> str:
        rate = next(iter(cell.runs.values())).stages[self.stage].learning_rate
        edge = " (edge)" if cell.searched_at_edge else ""
        return NONE if rate is None else f"{rate:.2g}{edge}"

    def weights(self, cell: Cell) -> int:
        """Return the number of trainable weights, including a head's."""
        return round(cell.mean(self.stage, lambda stage: stage.trainable_parameters))

    def seconds(self, cell: Cell) -> float:
        """Return the mean seconds per step."""
        role = STAGE_ROLE[self.stage]
        steps = [  # of all members of a reward model; the metrics are those of the first
            max(map(len, run.metrics[role].values()), default=1)
            * (run.section("reward").get("members", 1) if self.stage == "reward" else 1)
            for run in cell.runs.values()
        ]
        return cell.mean(self.stage, lambda stage: stage.seconds) * len(steps) / sum(steps)

    @property
    def reached(self) -> str:
        """A sentence on how many runs reached the KL; empty if nothing depends on it."""
        if self.stage != "rl":
            return ""
        curves = [
            found for cell in self.cells for run in cell.runs.values() if (found := curve(run.metrics["policy"]))
        ]
        below = sum(float(found.kl.max()) < self.kl for found in curves)
        ends = f"; {below} of {len(curves)} runs stay below it and are evaluated at their end" if below else ""
        return f"RL is evaluated at a KL of {decimal(self.kl)} nats per completion{ends}."

    def as_json(self) -> dict[str, object]:
        """Return the table's metrics."""
        return {
            "name": self.name,
            "stage": self.stage,
            "seeds": list(self.seeds),
            "rates_searched_on": list(self.searched_on),
            "kl": self.kl if self.stage == "rl" else None,
            "interval": "95 %, of the mean over seeds, by Student's t",
            "sentences": self.sentences,
            "rows": [self._metrics(cell) for cell in self.cells],
        }

    def _metrics(self, cell: Cell) -> dict[str, object]:
        ratio = self.rate_ratio(cell)
        return {
            "name": cell.setting.name,
            **asdict(cell.setting),
            "rates": None if cell.searched is None else list(cell.searched.rates),
            "rate_at_edge": cell.searched_at_edge,
            "rate_ratio_log10": _spread_json(ratio),
            **{quality.name: _spread_json(self.quality(cell, quality)) for quality in self.qualities},
            "difference": _spread_json(self.difference(cell)),
            "trained_weights": self.weights(cell),
            "peak_memory_bytes": cell.mean(self.stage, lambda stage: stage.peak_memory_bytes),
            "seconds_a_step": self.seconds(cell),
        }


def _grouped(
    what: str, value: Callable[[Cell], Spread | None], cells: Sequence[Cell], text: Callable[[Spread], str]
) -> list[str]:
    """Return a sentence for each direction that is shown, one for no difference, and one for single runs."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        if (found := value(cell)) is not None:
            edge = ", at the edge of the search" if text is _ratio_text and cell.searched_at_edge else ""
            groups.setdefault(_direction(found), []).append(f"{cell.setting.words} ({text(found)}{edge})")
    return [
        f"{what}, {direction}: {'; '.join(groups[direction])}." for direction in DIRECTIONS if direction in groups
    ]


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]


def _direction(value: Spread) -> str:
    higher, lower, unclear, single = DIRECTIONS
    if value.interval is None:
        return single
    low, high = value.interval
    return higher if low > 0 else lower if high < 0 else unclear


def _difference_text(value: Spread) -> str:
    if value.interval is None:
        return signed(value.mean, PLACES)
    return " to ".join(signed(end, PLACES) for end in value.interval)


def _ratio_text(value: Spread) -> str:
    """Format a ratio that is given as a logarithm to base 10."""
    if value.interval is None:
        return f"{10**value.mean:.2g} times"
    low, high = (f"{10**end:.2g}" for end in value.interval)
    return f"{10**value.mean:.2g} times, {low} to {high}"


def _spread_json(value: Spread | None) -> dict[str, object] | None:
    return None if value is None else asdict(value) | {"interval": value.interval}


def write_sweep(sweep: Sweep, file: Path) -> Path:
    """Write the page of a sweep; return the file."""
    first = next(iter(sweep.cells[0].runs.values()))
    runs = [(run.path.name, cell.setting.words, seed) for cell in sweep.cells for seed, run in cell.runs.items()]
    content = {
        "sweep": sweep,
        "columns": list(sweep.columns),
        "rows": [[text(cell) for text in sweep.columns.values()] for cell in sweep.cells],
        "plot": _plot(sweep, sweep.qualities[0]),
        "runs": runs,
        "first": first,
    }
    write_whole(file, filled("sweep.html.j2", content))
    return file


def _plot(sweep: Sweep, quality: Quality) -> Plot:
    label = _capital(quality.name)
    lines: dict[str, list[tuple[int, Spread]]] = {}
    for cell in sweep.cells:
        if (value := sweep.quality(cell, quality)) is not None:
            lines.setdefault(cell.setting.line, []).append((sweep.weights(cell), value))
    svg = weights_plot(label, lines)
    bars = f"Bars show the 95 % interval of the mean over {len(sweep.seeds)} seeds."
    chance = "One seed each: differences may be chance."
    return Plot(svg, bars if len(sweep.seeds) > 1 else chance)
