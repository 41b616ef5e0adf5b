"""The grid's tables: cells, and agreement between scales."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid.judge import paired_interval
from benchmarks.grid.verdict import collapsed, incidents, verdict

ROUNDING = 1e-3
"""Largest relative difference of metrics that rounding may cause."""
KEYS = ("model", "reward", "scale", "algorithm", "seed")


def name(result: dict[str, Any]) -> str:
    """Return a cell's name in tables and lines."""
    return " ".join(str(result[key]) for key in KEYS)


def line(result: dict[str, Any]) -> str:
    """Format a finished cell as one line."""
    word = verdict(result)
    if word == "failed":
        return f"{name(result)}: failed, status {result['exit']}, see its log.txt"
    low, high = result["interval"]
    alarms = "; ".join(incidents(result))
    return (
        f"{name(result)}: {word}, {result['reward_before']:.3f} -> {result['reward_after']:.3f} "
        f"({low:+.3f} to {high:+.3f}), KL {result['kl']:.1f}, {result['tokens_before']:.0f} -> "
        f"{result['tokens_after']:.0f} tokens, {result['seconds']:.0f} s{f'; {alarms}' if alarms else ''}"
    )


def write_tables(results: list[dict[str, Any]], out: Path) -> str:
    """Write grid.json and grid.md; return the summary and their paths."""
    scales = [scale_row(group) for group in _groups(results)]
    summary = _summary(results, scales)
    content = {"summary": summary, "scales": scales, "cells": results}
    (out / "grid.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([summary, "", *_cells(results), "", *_scales(scales), ""])
    (out / "grid.md").write_text(text, encoding="utf-8")
    return f"{summary}\nWritten: {out / 'grid.md'}, {out / 'grid.json'}"


def _summary(results: list[dict[str, Any]], scales: list[dict[str, Any]]) -> str:
    words = Counter(verdict(result) for result in results)
    counts = ", ".join(f"{words[word]} {word}" for word in ("up", "flat", "down", "failed"))
    silent = [name(result) for result in results if collapsed(result) and not incidents(result)]
    agree = Counter(row["agree"] for row in scales)
    return "\n".join(
        [
            f"{len(results)} cells: {counts} (95 % paired intervals).",
            f"Collapsed without an incident: {len(silent)}{': ' if silent else ''}{'; '.join(silent)}.",
            f"Scales agree: {', '.join(f'{count} {word}' for word, count in agree.items()) or 'not compared'}.",
        ]
    )


def _groups(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the cells that differ only in scale, without failed cells and groups of one."""

    def key(result: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(result[part] for part in KEYS if part != "scale")

    good = sorted((result for result in results if "interval" in result), key=key)
    groups = [list(group) for _, group in itertools.groupby(good, key)]
    return [group for group in groups if len(group) > 1]


def scale_row(group: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare cells that differ only in scale, which the judge's metrics do not depend on.

    `agree` is `to rounding` if no metric differs by more than `ROUNDING` (relative), `within noise` if the paired
    interval of the difference includes 0 for every two policies, else `no`.
    """
    metrics = ("reward_after", "kl", "tokens_after")
    apart = max(_relative([result[figure] for result in group]) for figure in metrics)
    noise = True
    for one, other in itertools.combinations(group, 2):
        low, high = paired_interval(np.subtract(one["rewards_after"], other["rewards_after"]))
        noise = noise and low <= 0 <= high
    first = group[0]
    return {
        **{part: first[part] for part in KEYS if part != "scale"},
        "rewards": {result["scale"]: result["reward_after"] for result in group},
        "kls": {result["scale"]: result["kl"] for result in group},
        "apart": apart,
        "agree": "to rounding" if apart <= ROUNDING else "within noise" if noise else "no",
    }


def _relative(values: list[float]) -> float:
    largest = max(map(abs, values))
    return (max(values) - min(values)) / largest if largest else 0.0


COLUMNS = (
    *KEYS, "verdict", "reward before", "after", "95 % of the change", "gold", "KL", "tokens", "ended", "different",
    "incidents", "s",
)  # fmt: skip


def _cells(results: list[dict[str, Any]]) -> list[str]:
    return [
        markdown_row(COLUMNS),
        "|" + "---|" * len(COLUMNS),
        *(markdown_row(_cell(result)) for result in results),
    ]


def markdown_row(entries: Sequence[object]) -> str:
    """Format a table row in Markdown."""
    return f"| {' | '.join(map(str, entries))} |"


def _cell(result: dict[str, Any]) -> list[object]:
    """Return a cell's entries, one per column."""
    start, seconds = [result[key] for key in KEYS], f"{result['seconds']:.0f}"
    if "interval" not in result:
        return [*start, f"failed ({result['exit']})", *[""] * (len(COLUMNS) - len(KEYS) - 2), seconds]
    low, high = result["interval"]

    def change(part: str, form: str) -> str:
        before, after = (result.get(f"{part}_{when}") for when in ("before", "after"))
        return "" if before is None else f"{before:{form}} → {after:{form}}"

    return [
        *start,
        verdict(result) + (", collapsed" if collapsed(result) else ""),
        f"{result['reward_before']:.3f}",
        f"{result['reward_after']:.3f}",
        f"{low:+.3f} to {high:+.3f}",
        change("gold", ".2f"),
        f"{result['kl']:.2f}",
        change("tokens", ".0f"),
        change("ended", ".2f"),
        change("distinct", ".2f"),
        "; ".join(incidents(result)),
        seconds,
    ]


def _scales(scales: list[dict[str, Any]]) -> list[str]:
    if not scales:
        return []
    first = [key for key in KEYS if key != "scale"]
    columns = [*first, "reward after, by scale", "KL, by scale", "apart", "agree"]
    rows = [markdown_row(columns), "|" + "---|" * len(columns)]
    for row in scales:
        by_scale = [
            ", ".join(f"{scale}: {value:.3f}" for scale, value in row[part].items()) for part in ("rewards", "kls")
        ]
        rows.append(markdown_row([*(row[key] for key in first), *by_scale, f"{row['apart']:.1e}", row["agree"]]))
    return rows
