"""Reads run folders, of which only report.json or progress.json is required, and groups them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from perl.errors import UserError
from perl.measure.reward_model_card import RewardModelCard
from perl.recipe import StageName
from perl.recipe.adapter import LORA, adapter_label
from perl.report.numbers import Spread, joined, spread
from perl.results import Report, Sample, SftEval, StageResult
from perl.rl.results import RlEval
from perl.roles.role import REWARD_MEMBERS, Role
from perl.system.files import text_if_any
from perl.system.plain_yaml import flat_keys
from perl.system.typed_json import parse, read

T = TypeVar("T")
DAMAGED = "Remove the damaged part and run the stage again."
TUNINGS = ("lora", "full")
LOGGED = (Role.SFT, *REWARD_MEMBERS, Role.POLICY)
"""Roles whose training has a metrics.jsonl."""
SHARED = ("name", "base.", "data.")
"""Recipe keys that must be the same under both tunings."""
Series = NDArray[np.float64]
"""A metric by step; NaN if a step has none."""


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run.

    Attributes:
        recipe_yaml: the resolved recipe; empty if the folder has none.
        metrics: a series per metric, for sft, policy, and each member of the reward model.
    """

    path: Path
    report: Report
    recipe_yaml: str
    metrics: Mapping[str, Mapping[str, Series]]
    samples: list[Sample]
    samples_by_step: list[Sample]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's keys; empty if it cannot be read."""
        try:
            recipe = yaml.safe_load(self.recipe_yaml)
        except yaml.YAMLError:
            return {}
        return recipe if isinstance(recipe, dict) else {}

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the recipe; empty if there is none."""
        section = self.recipe.get(name)
        return section if isinstance(section, dict) else {}

    @property
    def stages(self) -> dict[StageName, StageResult]:
        """The finished stages, in order."""
        return self.report.stages.finished


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read runs.

    Raises:
        UserError: there are none, one was not started, or a file in it is damaged.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise UserError("no runs given", where="RUN", remedy="Name one or more run folders.")
    return runs


def read_run(folder: Path) -> Run:
    """Read one run, finished or not.

    Raises:
        UserError: it was not started, or a file in it is damaged.
    """
    report = read(Report, folder / "progress.json", DAMAGED) or read(Report, folder / "report.json", DAMAGED)
    if report is None:
        remedy = f"Start it with `perl-rlhf run RECIPE --out {folder}`."
        raise UserError(
            "not a run: it has neither report.json nor progress.json", where=str(folder), remedy=remedy
        )
    return Run(
        path=folder,
        report=report,
        recipe_yaml=text_if_any(folder / "recipe.yaml", DAMAGED) or "",
        metrics={role: _metrics(folder / role.folder / "metrics.jsonl") for role in LOGGED},
        samples=_lines(Sample, folder / "policy" / "samples.jsonl"),
        samples_by_step=_lines(Sample, folder / "policy" / "samples-by-step.jsonl"),
    )


def _metrics(file: Path) -> dict[str, Series]:
    lines = _lines(dict[str, float | str | None], file)
    names = {name for line in lines for name, value in line.items() if isinstance(value, int | float)}
    return {name: np.array([line.get(name) for line in lines], dtype=np.float64) for name in sorted(names)}


def _lines(kind: type[T], file: Path) -> list[T]:
    """Return the values of the non-empty lines; none if there is no such file."""
    lines = enumerate((text_if_any(file, DAMAGED) or "").split("\n"), start=1)
    return [parse(kind, line, f"{file}, line {number}", DAMAGED) for number, line in lines if line.strip()]


@dataclass(frozen=True)
class Group:
    """The runs of one tuning, one per seed."""

    tuning: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The tuning in words: the kind of adapter, or full tuning."""
        if self.tuning == "full":
            return "Full tuning"
        return adapter_label(self.first.section("adapter").get("kind", LORA))

    @property
    def first(self) -> Run:
        """The run with the smallest seed."""
        return self.runs[0]

    @property
    def sft(self) -> list[SftEval]:
        """SFT's metrics of the runs that have them."""
        return [run.report.stages.sft.eval for run in self.runs if run.report.stages.sft is not None]

    @property
    def reward(self) -> list[RewardModelCard]:
        """The reward model cards of the runs that have one."""
        return [run.report.stages.reward.eval for run in self.runs if run.report.stages.reward is not None]

    @property
    def rl(self) -> list[RlEval]:
        """RL's metrics of the runs that have them."""
        return [run.report.stages.rl.eval for run in self.runs if run.report.stages.rl is not None]

    def over_runs(self, metric: Callable[[Run], float | None]) -> Spread | None:
        """Return a metric's mean and standard deviation over the runs that have it."""
        return spread(metric(run) for run in self.runs)


def groups(runs: Iterable[Run]) -> list[Group]:
    """Group the runs by tuning, LoRA first, sorted by seed.

    Raises:
        UserError: runs under one tuning differ in more than their seed, or have the same seed; or the two tunings
            do not have the same base and data.
    """
    ordered = sorted(runs, key=lambda run: run.report.seed)
    for other in ordered[1:]:
        _check_same(ordered[0], other, lambda key: key.startswith(SHARED))
    by_tuning = {tuning: tuple(run for run in ordered if run.report.tuning == tuning) for tuning in TUNINGS}
    for members in by_tuning.values():
        for one, other in pairwise(members):
            _check_same(one, other, lambda key: key != "seed")
            if one.report.seed == other.report.seed:
                what = f"both have seed {one.report.seed}, so they are not independent samples of the recipe"
                where = f"{one.path} and {other.path}"
                raise UserError(what, where=where, remedy="Name one run per seed.")
    return [Group(tuning, members) for tuning, members in by_tuning.items() if members]


def _check_same(one: Run, other: Run, matters: Callable[[str], bool]) -> None:
    first, second = _settings(one), _settings(other)
    keys = sorted(key for key in {*first, *second} if matters(key) and first.get(key) != second.get(key))
    if keys:
        raise UserError(
            f"they are runs of different recipes, which differ in {joined(keys)}",
            where=f"{one.path} and {other.path}",
            remedy=f"`perl-rlhf compare-runs {one.path} {other.path}` compares two models; the runs on one page "
            "may differ only in seed and tuning.",
        )


def _settings(run: Run) -> dict[str, object]:
    """Return the recipe's keys; for a run without a recipe, those that its report has."""
    report = run.report
    return flat_keys(run.recipe) if run.recipe else {"name": report.name, "base.model": report.base.model}
