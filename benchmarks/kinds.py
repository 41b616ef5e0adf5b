"""Every kind of adapter on one recipe: reward model and RL, each at its best learning rate, in one table.

    python -m benchmarks.kinds benchmarks/kinds.yaml --out DIR

Each row takes two `perl-rlhf sweep --search-rates`, one of the reward model and one of RL. They run kind by kind,
so that DIR/table.md has whole rows whenever the benchmark is stopped; started again, it resumes. A kind that
cannot be trained is left out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

KINDS = "lora full dora ia3 prefix:10 parallel:32 series:32 vera:256 miss:16 rslora tinylora:64".split()  # noqa: SIM905
STAGES: dict[str, tuple[str, list[str]]] = {
    "reward": ("AUROC", []),
    # All kinds share one reward model, the best known.
    "rl": ("gold at KL", ["--kl", "0.3", "reward.likelihood=true"]),
}
"""By stage: the metric in its sweep's rows, and further options of that sweep."""
HEAD = "| kind | weights | AUROC | less LoRA's | gold | less LoRA's | rates | memory, MB | a step, s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    arguments = parser.parse_args()
    done: list[str] = []
    for kind in arguments.kinds:
        finished = [swept(arguments.recipe, stage, [*done, kind], arguments.out / stage) for stage in STAGES]
        if not all(finished):
            print(f"{kind} is left out")
            continue
        done.append(kind)
        table = table_of(*(json.loads((arguments.out / stage / "sweep.json").read_text()) for stage in STAGES))
        (arguments.out / "table.md").write_text(table, encoding="utf-8")
        print(table, flush=True)


def swept(recipe: Path, stage: str, kinds: list[str], out: Path) -> bool:
    """Sweep a stage over these kinds; return whether the sweep succeeded."""
    options = [
        "--kinds",
        ",".join(kinds),
        "--stage",
        stage,
        "--search-rates",
        *STAGES[stage][1],
        "--out",
        str(out),
    ]
    return (
        subprocess.run([sys.executable, "-m", "perl", "sweep", str(recipe), *options], check=False).returncode == 0
    )


def table_of(*sweeps: dict[str, Any]) -> str:
    """Return one row per kind that every sweep has; pairs of values belong to the reward model and to RL."""
    rows = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    by_name = [{row["name"]: row for row in sweep["rows"]} for sweep in sweeps]
    for name, reward in by_name[0].items():
        pair = [of[name] for of in by_name if name in of]
        if len(pair) < len(by_name):
            continue
        cells = [reward["name"], f"{pair[-1]['trained_weights']:,}"]
        for row, (quality, _) in zip(pair, STAGES.values(), strict=True):
            cells += [interval(row.get(quality)), interval(row["difference"], "+")]
        for text in (
            rate,
            lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}",
            lambda row: f"{row['seconds_a_step']:.2f}",
        ):
            cells.append(", ".join(text(row) for row in pair))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def interval(value: dict[str, Any] | None, sign: str = "") -> str:
    """Format a mean and its 95 % interval."""
    if value is None:
        return ""
    ends = value["interval"]
    return f"{value['mean']:{sign}.3f}" + (
        "" if ends is None else f" ({ends[0]:{sign}.3f} to {ends[1]:{sign}.3f})"
    )


def rate(row: dict[str, Any]) -> str:
    """Format the best learning rate, with a mark if it is the lowest or highest tried."""
    return f"{row['rate']:g}" + ("*" if row["rate_at_edge"] else "")


if __name__ == "__main__":
    main()
