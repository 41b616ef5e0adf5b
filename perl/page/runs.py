"""Finished run folders, read into typed values.

What a run folder must hold is report.json; recipe, metrics and samples are shown where they are there.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from perl.errors import UserError
from perl.page.schema import Report, Sample, Stage

T = TypeVar("T")
Series = NDArray[np.float64]
"""A figure a step; NaN where a step has none."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    report: Report
    recipe_yaml: str
    """The recipe as resolved; empty if the folder has none."""
    metrics: dict[str, dict[str, Series]]
    """Of sft, reward and policy: a series a figure."""
    samples: Sequence[Sample]

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's keys; none if it cannot be read."""
        try:
            recipe = yaml.safe_load(self.recipe_yaml)
        except yaml.YAMLError:
            return {}
        return recipe if isinstance(recipe, dict) else {}

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that were run, in order."""
        named = (("sft", self.report.stages.sft), ("reward", self.report.stages.reward))
        stages: dict[str, Stage] = {name: stage for name, stage in named if stage is not None}
        return stages | ({"rl": self.report.stages.rl} if self.report.stages.rl is not None else {})


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read finished runs.

    Raises:
        UserError: there are none, one is not finished, or a file in it is broken.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise UserError("no runs given", where="RUN", remedy="Name one or several run folders.")
    return runs


def read_run(folder: Path) -> Run:
    """Read one finished run.

    Raises:
        UserError: it is not finished, or a file in it is broken.
    """
    file = folder / "report.json"
    text = _text(file)
    if text is None:
        raise UserError(
            "not a finished run: it has no report.json",
            where=str(folder),
            remedy="Finish it with `perl-rlhf run RECIPE --out` and this folder.",
        )
    return Run(
        path=folder,
        report=_parsed(TypeAdapter(Report), text, str(file)),
        recipe_yaml=_text(folder / "recipe.yaml") or "",
        metrics={role: _metrics(folder / role / "metrics.jsonl") for role in ("sft", "reward", "policy")},
        samples=_samples(folder / "policy" / "samples.jsonl"),
    )


def _metrics(file: Path) -> dict[str, Series]:
    lines = [_parsed(TypeAdapter(dict[str, Any]), line, where) for line, where in _lines(file)]
    names = {name for line in lines for name, value in line.items() if isinstance(value, int | float)}
    return {name: np.array([_number(line.get(name)) for line in lines]) for name in sorted(names)}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _samples(file: Path) -> list[Sample]:
    return [_parsed(TypeAdapter(Sample), line, where) for line, where in _lines(file)]


def _lines(file: Path) -> list[tuple[str, str]]:
    """The lines that are not empty, each with where it stands; none if there is no such file."""
    lines = enumerate((_text(file) or "").split("\n"), start=1)
    return [(line, f"{file}, line {number}") for number, line in lines if line.strip()]


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), remedy="Check the file.") from None


def _parsed(adapter: TypeAdapter[T], text: str, where: str) -> T:
    remedy = "Remove the damaged part and run the stage again."
    try:
        return adapter.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{key or 'the value'}: {first['msg']}", where=where, remedy=remedy) from None
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, remedy=remedy) from None
