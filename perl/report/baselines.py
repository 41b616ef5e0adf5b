"""The table of `compare --baselines`, which compares RL with baselines at the same KL, for page and terminal."""

import statistics
from collections.abc import Sequence
from itertools import groupby

from perl.baselines.results import BaselineResult, Reached
from perl.measure.change import equal_words
from perl.measure.two_runs import Difference
from perl.report.numbers import NONE, bytes_text, decimal, interval_text, joined, seconds_text
from perl.report.outcome import interval_of_mean
from perl.system.progress import counted

COLUMNS = ("Method", "Seed", "KL", "Metric", "Baseline", "RL", "RL minus baseline (95 %)", "")
METRICS = ("gold", "reward")
VERDICT = ("no difference shown", "the baseline is higher", "RL is higher")


def table_rows(results: Sequence[BaselineResult]) -> list[tuple[str, ...]]:
    """Return one row per baseline, metric and seed, and with several seeds one more for their mean."""
    rows: list[tuple[str, ...]] = []
    for method, of_method in _by_method(results):
        for metric in METRICS:
            both = [
                (one, found) for one in of_method for found in one.matched.differences if found.metric == metric
            ]
            rows += [_row(method, str(one.seed), decimal(one.kl), found) for one, found in both]
            if len(both) > 1:
                rows.append(_row(method, "mean", NONE, _mean([found for _, found in both])))
    return rows


def trainings(results: Sequence[BaselineResult]) -> list[str]:
    """Return a sentence per baseline: what it was trained on, its cost, and how far both policies went."""
    lines = []
    for method, of_method in _by_method(results):
        one = of_method[0]
        cost = f"{seconds_text(one.seconds)}, peak memory {bytes_text(one.peak_memory_bytes)}"
        lines.append(
            f"{method.upper()}: {one.rows:,} {one.learns_from}, {counted(one.steps, 'step')} at a learning rate "
            f"of {one.learning_rate:g}, {cost}. It ended at {_ends([found.policies for found in of_method])}; "
            f"RL at {_ends([found.rl_policies for found in of_method])}."
        )
    return lines


def _ends(policies: Sequence[Sequence[Reached]]) -> str:
    """Describe the last policy of each seed."""
    last = [of_seed[-1] for of_seed in policies]
    golds = [one.gold for one in last if one.gold is not None]
    figures = [("KL", [one.kl for one in last]), ("reward", [one.reward for one in last]), ("gold", golds)]
    return ", ".join(f"{name} {joined([decimal(one) for one in values])}" for name, values in figures if values)


def _by_method(results: Sequence[BaselineResult]) -> list[tuple[str, list[BaselineResult]]]:
    ordered = sorted(results, key=lambda one: (one.method, one.seed))
    return [(method, list(of)) for method, of in groupby(ordered, key=lambda one: one.method)]


def _row(method: str, seed: str, kl: str, found: Difference) -> tuple[str, ...]:
    ends = (NONE if one is None else decimal(one, 3) for one in (found.first, found.second))
    change = equal_words(found.interval) or interval_text(found.interval, 3)
    return method.upper(), seed, kl, found.metric, *ends, change, VERDICT[found.higher]


def _mean(found: Sequence[Difference]) -> Difference:
    first = statistics.fmean(one.first for one in found if one.first is not None)
    second = statistics.fmean(one.second for one in found if one.second is not None)
    interval = interval_of_mean([one.interval for one in found])
    return Difference(metric=found[0].metric, first=first, second=second, interval=interval)
