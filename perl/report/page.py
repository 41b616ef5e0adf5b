"""Writes the page: findings, plots and tables in one HTML file that loads nothing from a network."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from perl.baselines.results import BaselineResult
from perl.measure.bootstrap import Interval
from perl.measure.change import equal_words, places_of
from perl.report import charts, policy_charts, words
from perl.report.baselines import COLUMNS, table_rows, trainings
from perl.report.card import Row, card, folded
from perl.report.numbers import (
    NONE,
    Spread,
    bytes_text,
    decimal,
    interval_text,
    percent,
    plus_minus,
    seconds_text,
    spread,
    spread_text,
)
from perl.report.outcome import match_all, mean_change
from perl.report.runs import Group, groups, read_runs
from perl.report.samples import during_training, examples
from perl.report.templates import filled
from perl.report.tunings import COSTS, balance, bottom_line, cost_rows, predictions, quality_rows
from perl.results import RlStage
from perl.rl.results import PairedMetric
from perl.system.files import user_named, write_whole

SHOWN_SAMPLES = 3
"""Number of samples shown; the others, and those that did not change, are collapsed."""
POLICY: list[tuple[str, PairedMetric, int, int]] = [
    ("Reward", "reward", 2, 1),
    ("Gold judge: right, %", "gold", 1, 100),
    ("Completion length, tokens", "answer_tokens", 1, 1),
    ("Completions that end by themselves, %", "ended", 1, 100),
]
"""Label, metric, minimum decimal places, and scale."""


def write_page(runs: Sequence[Path], file: Path, baselines: Sequence[BaselineResult] = ()) -> Path:
    """Write the page of one or more runs; return the file.

    Args:
        runs: run folders: seeds of one recipe, under one tuning or both.
        baselines: baselines that RL is compared with.

    Raises:
        UserError: there are no runs, one was not started or is damaged, they have different recipes, or the file
            cannot be written.
    """
    beside = {"head": COLUMNS, "rows": table_rows(baselines), "words": trainings(baselines)} if baselines else None
    text = filled("page.html.j2", _content(groups(read_runs(runs))) | {"baselines": beside})
    with user_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return file


def _content(by_tuning: Sequence[Group]) -> dict[str, object]:
    """Return everything that the template shows."""
    main = by_tuning[0]
    runs = [run for group in by_tuning for run in group.runs]
    rl = main.first.report.stages.rl
    return {
        "main": main,
        "first": main.first,
        "verdict": words.verdict(main),
        "incidents": words.incidents(runs),
        "tiles": _tiles(main),
        "summary": words.summary(main, runs),
        "preflight": _checks(rl) if rl else [],
        "runs": [(r.path.name, r.report.name, one.label, r.report.seed) for one in by_tuning for r in one.runs],
        "policy": _policy(main) if main.rl else None,
        "card": card(by_tuning) if main.reward else None,
        "sft": words.sft_words(main),
        "sft_plot": charts.step_plot(main, "sft", "loss", "Loss in SFT", "loss"),
        "cost_head": ["stage", *(name for name, _, _ in COSTS)],
        # Of one run, because seeds cost about the same.
        "cost_rows": [
            [
                words.STAGE[name],
                *(NONE if (cost := value(stage)) is None else text(cost) for _, value, text in COSTS),
            ]
            for name, stage in main.first.stages.items()
        ],
        "cost_plots": charts.cost_plots(by_tuning),
        "tunings": _tunings(by_tuning) if len(by_tuning) > 1 else None,
        "predictions": predictions(by_tuning),
        "unfinished": _unfinished(main),
        "samples": examples(main.first.samples) if main.first.samples else None,
        "by_step": during_training(main.first.samples_by_step),
        "kept": [
            f"{words.STAGE[name]}: {told}" for name, stage in main.first.stages.items() for told in stage.notes
        ],
        "shown_samples": SHOWN_SAMPLES,
        "next": _next_steps(main, compared=len(by_tuning) > 1),
    }


def _unfinished(group: Group) -> dict[str, object] | None:
    """Return the progress of the stage in training, with its plots; None for finished runs."""
    stage = group.first.report.unfinished
    if stage is None:
        return None
    role = "policy" if stage == "rl" else stage
    shown = (("reward", "Reward", "reward"), ("kl", "KL", "nats per completion"))
    names = shown if stage == "rl" else (("loss", "Loss", "loss"),)
    plots = [charts.step_plot(group, role, name, f"{title} so far", unit) for name, title, unit in names]
    steps = len(group.first.metrics[role].get("step", ()))
    return {"stage": words.STAGE[stage], "steps": steps, "plots": [plot for plot in plots if plot is not None]}


def _checks(rl: RlStage) -> list[Row]:
    """Return the checks before and after the first update: description, value and limit."""
    checks = [*(("", one) for one in rl.preflight), *(("after the first update: ", one) for one in rl.liveness)]
    return [(when + one.words, f"{one.figure:.2g}", f"{one.limit:.2g}") for when, one in checks]


def _tiles(group: Group) -> list[Row]:
    """Return the key metrics: label, value, note."""
    tiles: list[Row] = []
    reward, gold = mean_change(group.rl, "reward"), mean_change(group.rl, "gold")
    if gold is not None:
        ends = f"{percent(gold.before.mean)} → {percent(gold.after.mean)}"
        tiles.append(("Gold judge: right", ends, "share of completions of held-out prompts"))
    if reward is not None:
        ends = f"{decimal(reward.before.mean, reward.places)} → {decimal(reward.after.mean, reward.places)}"
        tiles.append(("Reward", ends, "on held-out prompts, before → after RL"))
    kl, ranked = spread(one.kl for one in group.rl), spread(card.ranked[0] for card in group.reward)
    if kl is not None:
        note = f"nats per completion {plus_minus(kl)}".strip()
        tiles.append(("KL from the reference", decimal(kl.mean), note))
    if ranked is not None:
        note = plus_minus(ranked) or "0.5 is a coin flip, 1 is perfect"
        tiles.append((f"Reward model {group.reward[0].metric}", decimal(ranked.mean), note))
    seconds = group.over_runs(lambda run: sum(one.waited_seconds or one.seconds for one in run.stages.values()))
    of_runs = [list(run.stages.values()) for run in group.runs]
    peak = spread(max((stage.peak_memory_bytes for stage in one), default=None) for one in of_runs)
    held = spread(max((stage.peak_rss_bytes for stage in one), default=None) for one in of_runs)
    if seconds is not None and peak is not None and held is not None:
        label = "Time per seed" if len(group.runs) > 1 else "Time"
        note = f"peak memory: {bytes_text(peak.mean)} of tensors, {bytes_text(held.mean)} of the process"
        tiles.append((label, seconds_text(seconds.mean), note))
    return tiles


def _policy(group: Group) -> dict[str, object]:
    """Return the policy's table and plots."""
    rows, alone = [], len(group.rl) == 1
    for label, metric, places, scale in POLICY:
        changes = [change for one in group.rl if (change := one.change(metric)) is not None]
        ends = [spread(scale * getattr(one, end) for one in changes) for end in ("before", "after")]
        if changes:
            rows.append(_policy_row(label, ends, changes[0].interval if alone else None, places, scale))
    rows[1:1] = [*_part_rows(group), *_pass_rows(group)]
    ends = [None, spread(one.kl for one in group.rl)]
    interval = group.rl[0].kl_interval if alone else None
    rows.append(_policy_row("KL to the reference, nats per completion", ends, interval))
    reward = mean_change(group.rl, "reward")
    means = (reward.before, reward.after) if reward is not None else ()
    gold = mean_change(group.rl, "gold")
    golds = (gold.before, gold.after) if gold is not None else ()
    plots = [
        charts.step_plot(group, "policy", "reward", "Reward", "reward of sampled completions", means),
        charts.step_plot(group, "policy", "gold", "Gold judge", "completions found right, %", golds, scale=100.0),
        policy_charts.root_kl_plot([group], "root-kl"),
        charts.step_plot(group, "policy", "kl", "KL", "nats per completion"),
        policy_charts.reward_histogram_plot(group),
        policy_charts.trust_region_plot(group),
    ]
    table = folded(["Metric", "Before RL", "After RL", "Change, 95 %"], rows, shown=len(rows))
    return {**table, "plots": [plot for plot in plots if plot is not None]}


def _policy_row(
    label: str, ends: Sequence[Spread | None], interval: Interval | None = None, places: int = 2, scale: int = 1
) -> Row:
    """Return a row with the means before and after, with enough decimal places to show the change."""
    known = [abs(end.mean) for end in ends if end is not None]
    equal = equal_words(interval)
    if interval is not None and not equal:
        interval = (scale * interval[0], scale * interval[1])
        places = max(places, places_of(interval[1] - interval[0]))
    elif len(known) == len(ends):
        places = max(places, places_of(max(known)))
    return (label, *(spread_text(end, places) for end in ends), equal or interval_text(interval, places))


def _part_rows(group: Group) -> list[Row]:
    """Return a row for each part of the reward, unless the only part is the reward itself."""
    pairs = [(one.reward_parts_before or {}, one.reward_parts_after or {}) for one in group.rl]
    names = dict.fromkeys(name for before, after in pairs for name in (*before, *after))
    rewards = [reward for one in group.rl for reward in (one.reward_before, one.reward_after)]
    parts = [value for pair in pairs for side in pair for value in side.values()]
    if len(parts) == len(rewards) and all(map(partial(math.isclose, rel_tol=1e-5), parts, rewards)):
        return []
    rows = []
    for name in names:
        ends = [spread(parts.get(name) for parts in side) for side in zip(*pairs, strict=True)]
        rows.append(_policy_row(f"… {name}", ends))
    return rows


def _pass_rows(group: Group) -> list[Row]:
    """Return pass@k for each k that all runs measured; for a single run with the intervals of both values."""
    measured = [{row.k: row for row in one.pass_at or []} for one in group.rl]
    rows = []
    for k in sorted(set[int].intersection(*map(set, measured))):
        of_k, alone = [row[k] for row in measured], len(measured) == 1
        ends = [spread(getattr(row, end) for row in of_k) for end in ("before", "after")]
        label, *cells, change = _policy_row(f"pass@{k}", ends, of_k[0].interval if alone else None)
        if alone:
            intervals = (of_k[0].before_interval, of_k[0].after_interval)
            cells = [f"{cell} ({interval_text(one)})" for cell, one in zip(cells, intervals, strict=True)]
        rows.append((label, *cells, change))
    return rows


def _tunings(by_tuning: Sequence[Group]) -> dict[str, object]:
    """Return the comparison of LoRA with full tuning."""
    lora, full = by_tuning
    matched = match_all(by_tuning)
    costs, qualities = cost_rows(lora, full), quality_rows(lora, full, matched)
    return {
        "bottom_line": bottom_line(qualities, lora.label),
        "balance": balance(costs, qualities),
        "costs": [(f"{row.stage}: {row.metric}", *row.cells) for row in costs],
        "qualities": [(row.metric, *row.cells) for row in qualities],
        "plot": policy_charts.root_kl_plot(by_tuning, "tunings", matched.kl if matched else None),
        "matched": matched,
        "seeds": [len(group.runs) for group in by_tuning],
    }


def _next_steps(group: Group, compared: bool) -> list[tuple[str, str]]:
    """Return what can be done with these runs, as pairs of purpose and command.

    Args:
        compared: whether the page compares two tunings.
    """
    run = group.first
    folder = run.path.name if run.path.is_absolute() else run.path.as_posix()
    again = f"perl-rlhf run {folder}/recipe.yaml"
    steps = []
    if group.rl:
        steps += [
            ("Chat with the policy, side by side with base and SFT", f"perl-rlhf chat {folder}"),
            ("Export it for peft and vLLM", f"perl-rlhf export {folder} policy exported/policy"),
        ]
    elif group.reward:
        steps += [
            ("Score your own completions", f"perl-rlhf score {folder} FILE --out scores.jsonl"),
            ("Export the reward model", f"perl-rlhf export {folder} reward exported/reward"),
        ]
    elif group.sft:
        steps += [("Export the model for peft and vLLM", f"perl-rlhf export {folder} sft exported/sft")]
    if not run.recipe:
        return steps
    if group.rl:
        done = run.section("rl").get("steps")
        setting = f"rl.steps={2 * done}" if isinstance(done, int) else "rl.kl_coef=0.1"
        command = f"{again} {setting} --from {folder} --out {folder}-2"
        steps += [("Train only RL again, with another setting", command)]
    if len(group.runs) == 1:
        seed = run.report.seed + 1
        steps += [("See whether another seed agrees", f"{again} seed={seed} --out {folder}-seed-{seed}")]
    if run.stages and not compared:
        steps += [("Compare with full tuning", f"perl-rlhf compare {folder}/recipe.yaml")]
    return steps
