"""Cost of training on completions that are one update old: staleness 0 and 1, over seeds.

`python -m benchmarks.staleness --out DIR` trains TinyStories-656K on the grid's dense reward. A local sampler,
which this file adds as a plugin, imitates the order of servers under `rl.sampler.staleness: 1`: it draws a step's
completions before the previous step's update. It is not faster.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.grid.frontier import interval
from benchmarks.grid.models import ROOT
from benchmarks.grid.table import markdown_row
from perl.rl.samplers import SAMPLERS
from perl.rl.samplers.base import Read, Samples, Sampling, Share
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role

Prompts = Sequence[Sequence[int]]
WINDOW = 10
"""Steps that each metric is averaged over."""
METRICS = ("reward", "kl")


class OneStepAhead(LocalSampler):
    """Draws as soon as the next prompts are known, as a server does; the policy's log-probs are computed later."""

    exact, lags = False, True
    _begun: tuple[list[list[int]], Samples] | None = None

    def begin(
        self,
        role: Role,
        prompts: Prompts,
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> None:
        self._begun = [*map(list, prompts)], super().draw(role, prompts, sampling, generator, share)

    def draw(
        self,
        role: Role,
        prompts: Prompts,
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
        read: Read | None = None,
    ) -> Samples:
        if role is Role.POLICY and self._begun is not None and self._begun[0] == [*map(list, prompts)]:
            (_, samples), self._begun = self._begun, None
            return samples
        return super().draw(role, prompts, sampling, generator, share)


SAMPLERS["one-step-ahead"] = OneStepAhead


def run(seed: int, staleness: int, out: Path, given: Sequence[str]) -> Path:
    """Run a recipe unless it is finished, and return its folder."""
    folder = out / f"staleness-{staleness}-seed-{seed}"
    changes = [f"seed={seed}", *given]
    if staleness:
        changes += [f"plugins=[{Path(__file__).resolve()}]", "rl.sampler.kind=one-step-ahead"]
    recipe = str(ROOT / "recipes" / "tinystories-animals.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "perl", "run", recipe, *changes, "--out", str(folder)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder


def found(folder: Path) -> dict[str, dict[str, float]]:
    """Return a run's reward and KL: means over each `WINDOW` steps, and the final evaluation."""
    lines = (folder / "policy" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    evaluation = json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"]["rl"]["eval"]
    rows = {
        f"steps {first + 1} to {first + WINDOW}": {
            name: float(np.mean([step[name] for step in steps[first : first + WINDOW]])) for name in METRICS
        }
        for first in range(0, len(steps), WINDOW)
    }
    return rows | {"held out, at the end": {"reward": evaluation["reward_after"], "kl": evaluation["kl"]}}


def table(runs: dict[int, list[dict[str, dict[str, float]]]]) -> str:
    """Return means over seeds, and the paired differences with Student's 95 % interval.

    Args:
        runs: metrics of the runs by staleness, with the seeds in the same order.
    """
    columns = [f"{name}, {words}" for name in METRICS for words in ("0", "1", "1 less 0")]
    lines = [markdown_row(["", *columns]), "|" + "---|" * (1 + len(columns))]
    for row in runs[0][0]:
        cells: list[Any] = [row]
        for name in METRICS:
            values = [np.array([one[row][name] for one in runs[staleness]]) for staleness in (0, 1)]
            cells += [f"{value.mean():.2f}" for value in values]
            cells.append("{:+.2f} ± {:.2f}".format(*interval([*(values[1] - values[0])])))
        lines.append(markdown_row(cells))
    return "\n".join(lines)


def main() -> None:
    """Run all that is not finished, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"), metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="Seeds 0 to N - 1; 3 by default.")
    parser.add_argument("given", nargs="*", metavar="KEY=VALUE", help="Set in all runs' recipes.")
    asked = parser.parse_args()
    runs: dict[int, list[dict[str, dict[str, float]]]] = {0: [], 1: []}
    for seed in range(asked.seeds):
        for staleness, of_seeds in runs.items():
            of_seeds.append(found(run(seed, staleness, asked.out, asked.given)))
    print(table(runs))


if __name__ == "__main__":
    main()
