"""Reward at equal KL: `python -m benchmarks.grid.frontier --out DIR` reads a grid's finished cells.

After the same number of steps, algorithms differ in KL, so their last rewards cannot be compared. Each run's curve
can: reward and KL of each step's completions, both averaged over `WINDOW` steps. The table gives the reward where
the KL first reaches a given value (interpolated linearly between steps): its mean over seeds, and the paired
difference from the default algorithm with Student's 95 % interval.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from benchmarks.grid.table import markdown_row
from benchmarks.grid.verdict import collapsed, incidents, verdict

Floats = NDArray[np.float64]
WINDOW = 9
"""Steps, of 16 completions each."""
BESIDE = "ppo"


@dataclass(frozen=True)
class Run:
    """A finished cell: its curve over steps (S), and the judge's metrics at the end."""

    reward_S: Floats
    kl_S: Floats
    gain: float
    kl: float
    verdict: str
    incidents: list[str]

    def reached(self, kl: float) -> tuple[float, float] | None:
        """Return step and reward where the curve first reaches `kl`; None if it never does."""
        above = np.flatnonzero(self.kl_S >= kl)
        if not above.size:
            return None
        after = int(above[0])
        if after == 0:
            return 1.0, float(self.reward_S[0])
        low, high = self.kl_S[after - 1], self.kl_S[after]
        part = float((kl - low) / (high - low))
        reward = self.reward_S[after - 1] + part * (self.reward_S[after] - self.reward_S[after - 1])
        return after + part, float(reward)


def read_run(cell: Path) -> Run:
    """Read the run of a finished cell.

    Args:
        cell: folder of the cell.
    """
    result = json.loads((cell / "cell.json").read_text(encoding="utf-8"))
    lines = (cell / "run" / "policy" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    reward_S, kl_S = (_smooth(np.array([step[name] for step in steps])) for name in ("reward", "kl"))
    word = "collapsed" if collapsed(result) else verdict(result)
    gain = result["reward_after"] - result["reward_before"]
    return Run(reward_S, kl_S, gain, result["kl"], word, incidents(result))


def _smooth(values_S: Floats) -> Floats:
    """Return centred means over `WINDOW` steps, or over those that exist at the ends."""
    ones_W = np.ones(WINDOW)
    return np.convolve(values_S, ones_W, "same") / np.convolve(np.ones_like(values_S), ones_W, "same")


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of Student's 95 % interval, infinite for fewer than two values."""
    found = np.array(values)
    if found.size < 2:
        return float(found.mean()), float("inf")
    return float(found.mean()), float(t.ppf(0.975, found.size - 1) * found.std(ddof=1) / np.sqrt(found.size))


def table(runs: dict[str, dict[int, Run]], kls: list[float]) -> list[str]:
    """Return the table, with one row per algorithm.

    Args:
        runs: runs by algorithm and seed.
        kls: sizes at which the curves are compared, in nats per completion.
    """
    at = [f"{what} at KL {kl:g}" for kl in kls for what in ("reward", f"less {BESIDE}'s")]
    columns = ["algorithm", "seeds", "up", *at, f"step of KL {kls[0]:g}", "last: gain", "KL", "incidents"]
    rows = [markdown_row(columns), "|" + "---|" * len(columns)]
    for name, of_seed in runs.items():
        compared = [entry for kl in kls for entry in _compared(of_seed, runs.get(BESIDE, {}), kl)]
        steps = [found[0] for run in of_seed.values() if (found := run.reached(kls[0])) is not None]
        of_all = list(of_seed.values())
        alarms = sorted({alarm.partition(" ")[0] for run in of_all for alarm in run.incidents})
        rows.append(
            markdown_row(
                [
                    f"`{name}`",
                    len(of_all),
                    sum(run.verdict == "up" for run in of_all),
                    *compared,
                    f"{np.mean(steps):.0f}" if steps else "",
                    "{:+.2f} ± {:.2f}".format(*interval([run.gain for run in of_all])),
                    f"{np.mean([run.kl for run in of_all]):.1f}",
                    ", ".join(alarms),
                ]
            )
        )
    return rows


def _compared(runs: dict[int, Run], beside: dict[int, Run], kl: float) -> tuple[str, str]:
    """Format the mean reward at this KL, with the number of seeds that reached it, and the paired difference."""
    found = {seed: at[1] for seed, run in runs.items() if (at := run.reached(kl)) is not None}
    if not found:
        return "not reached", ""
    mean = f"{np.mean(list(found.values())):.2f}"
    if len(found) < len(runs):
        mean += f" ({len(found)} of {len(runs)})"
    paired = [
        reward - at[1]
        for seed, reward in found.items()
        if seed in beside and (at := beside[seed].reached(kl)) is not None
    ]
    if runs is beside or len(paired) < 2:
        return mean, ""
    middle, half = interval(paired)
    return mean, f"{middle:+.2f} ± {half:.2f}" + ("" if abs(middle) <= half else " **")


def main() -> None:
    """Write frontier.md and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid.frontier", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/grid"), metavar="DIR", help="The grid's folder.")
    parser.add_argument("--kl", default="3,8", metavar="A,B", help="Nats per completion; 3,8 by default.")
    given = parser.parse_args()
    kls = [float(part) for part in given.kl.split(",")]
    runs: dict[tuple[str, str], dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(given.out.glob("cells/*/cell.json"), key=lambda file: file.stat().st_mtime):
        plan = json.loads(file.read_text(encoding="utf-8"))
        if plan["exit"] == 0:
            runs[plan["model"], plan["reward"]][plan["algorithm"]][plan["seed"]] = read_run(file.parent)
    text = "\n\n".join(
        "\n".join([f"{model}, {reward}", "", *table(of_name, kls)]) for (model, reward), of_name in runs.items()
    )
    (given.out / "frontier.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
