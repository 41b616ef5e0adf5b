"""The page: findings, plots and tables put into one HTML file that asks nothing of any network."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from perl.measure.bootstrap import Interval
from perl.measure.change import places_of
from perl.measure.reward_eval import RewardEval
from perl.recipe import StageName
from perl.report import charts, words
from perl.report.numbers import (
    NONE,
    bytes_text,
    decimal,
    figure,
    interval_text,
    percent,
    plus_minus,
    seconds_text,
    signed,
    spread,
    spread_text,
)
from perl.report.outcome import gold_change, match_all, reward_change
from perl.report.runs import Group, groups, read_runs
from perl.report.tunings import COSTS, balance, bottom_line, cost_rows, predictions, quality_rows, reward_line
from perl.results import RlEval, RlStage, Sample, StageResult, Turn
from perl.system.files import user_named, write_whole
from perl.system.progress import counted

SHOWN_SAMPLES = 8
"""Further samples stand in a fold, and so do earlier turns and further metrics."""
SHOWN_TURNS = 3
SHOWN_FIGURES = 4
ROLES = {"base": "Base", "sft": "After SFT", "policy": "After RL"}
Ends = tuple[float | None, float | None]
POLICY: list[tuple[str, Callable[[RlEval], Ends], Callable[[RlEval], Interval | None], int, int]] = [
    ("Reward", lambda rl: (rl.reward_before, rl.reward_after), lambda rl: rl.reward_interval, 2, 1),
    ("Gold judge: right, %", lambda rl: (rl.gold_before, rl.gold_after), lambda rl: rl.gold_interval, 1, 100),
    (
        "Completion length, tokens",
        lambda rl: (rl.answer_tokens_before, rl.answer_tokens_after),
        lambda rl: rl.answer_tokens_interval,
        1,
        1,
    ),
    (
        "Completions that end by themselves, %",
        lambda rl: (rl.ended_before, rl.ended_after),
        lambda rl: rl.ended_interval,
        1,
        100,
    ),
    ("KL to the reference, nats a completion", lambda rl: (None, rl.kl), lambda rl: rl.kl_interval, 2, 1),
]
"""Label, ends, interval of the change, decimal places at least, and scale."""
CARD: list[tuple[str, Callable[[RewardEval], float | None], Callable[[RewardEval], Interval | None]]] = [
    ("AUROC", lambda card: card.auroc, lambda card: card.intervals.get("auroc")),
    (
        "Pairwise accuracy",
        lambda card: card.pairwise_accuracy,
        lambda card: card.intervals.get("pairwise_accuracy"),
    ),
    ("Accuracy", lambda card: card.accuracy, lambda card: card.intervals.get("accuracy")),
    ("… of the majority label alone", lambda card: card.majority_accuracy, lambda _: None),
    ("AUROC against the labels", lambda card: card.auroc_labels, lambda card: card.intervals.get("auroc_labels")),
    (
        "Balanced accuracy",
        lambda card: card.balanced_accuracy,
        lambda card: card.intervals.get("balanced_accuracy"),
    ),
    ("TF-IDF + logistic regression", lambda card: card.floor.value, lambda card: card.floor.value_interval),
    ("… the model is ahead by", lambda card: card.floor.ahead, lambda card: card.floor.ahead_interval),
    ("AUROC of length alone", lambda card: card.length.auroc_of_length, lambda _: None),
    (
        "… of the model among like lengths",
        lambda card: card.length.auroc_within,
        lambda card: card.length.auroc_within_interval,
    ),
    ("Correlation with length (Spearman)", lambda card: card.length.correlation, lambda _: None),
    ("Calibration error (ECE), as it is", lambda card: card.calibration.ece_before, lambda _: None),
    ("… with a temperature", lambda card: card.calibration.ece_temperature, lambda _: None),
    ("… with slope and intercept", lambda card: card.calibration.ece_after, lambda _: None),
]
"""Label, value, interval."""


def write_page(runs: Sequence[Path], file: Path) -> Path:
    """Write the page of finished runs.

    Args:
        runs: run folders: seeds of one recipe, under one tuning or both.
        file: where the page goes.

    Returns:
        the file.

    Raises:
        UserError: there are no runs, one is not finished or is broken, they are of different recipes, or the file
            cannot be written.
    """
    text = filled("page.html.j2", _content(groups(read_runs(runs))))
    with user_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return file


def filled(template: str, content: Mapping[str, Any]) -> str:
    """One of the package's templates, filled in: the same content gives the same text."""
    loader = PackageLoader("perl", "report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(signed=signed, decimal=decimal, figure=figure, counted=counted)
    style = Markup(loader.get_source(environment, "page.css")[0])
    return environment.get_template(template).render(style=style, **content)


def _content(by_tuning: Sequence[Group]) -> dict[str, Any]:
    """All that the template shows."""
    main = by_tuning[0]
    everyone = [run for group in by_tuning for run in group.runs]
    rl = main.first.report.stages.rl
    return {
        "main": main,
        "first": main.first,
        "verdict": words.verdict(main),
        "happenings": words.happenings(everyone),
        "tiles": _tiles(main),
        "summary": words.summary(main, everyone),
        "preflight": _checks(rl) if rl else [],
        "runs": [
            (run.path.name, run.report.name, group.label, run.report.seed)
            for group in by_tuning
            for run in group.runs
        ],
        "policy": _policy(main) if main.rl else None,
        "card": _card(by_tuning) if main.reward else None,
        "sft": words.sft_words(main),
        "sft_plot": charts.step_plot(main, "sft", "loss", "Loss in SFT", "loss"),
        "cost_head": ["stage", *(name for name, _, _ in COSTS)],
        # Of one run: seeds cost about the same.
        "cost_rows": [_cost_row(name, stage) for name, stage in main.first.stages.items()],
        "cost_plots": charts.cost_plots(by_tuning),
        "tunings": _tunings(by_tuning) if len(by_tuning) > 1 else None,
        "predictions": predictions(by_tuning),
        "samples": [_shown(sample) for sample in main.first.samples],
        "shown_samples": SHOWN_SAMPLES,
    }


def _checks(rl: RlStage) -> list[tuple[str, str, str]]:
    """The checks before the first update and after it: what, the value, and what it may be at most."""
    found = [*(("", one) for one in rl.preflight), *(("after the first update: ", one) for one in rl.liveness)]
    return [(when + one.words, f"{one.figure:.2g}", f"{one.limit:.2g}") for when, one in found]


def _cost_row(name: StageName, stage: StageResult) -> list[str]:
    values = [(value(stage), text) for _, value, text in COSTS]
    return [words.STAGE[name], *(NONE if value is None else text(value) for value, text in values)]


def _tiles(group: Group) -> list[tuple[str, str, str]]:
    """Key metrics: label, value, note."""
    tiles = []
    reward, gold = reward_change(group.rl), gold_change(group.rl)
    if gold is not None:
        ends = f"{percent(gold.before.mean)} → {percent(gold.after.mean)}"
        tiles.append(("Gold judge: right", ends, "share of completions of held-out prompts"))
    if reward is not None:
        ends = f"{decimal(reward.before.mean, reward.places)} → {decimal(reward.after.mean, reward.places)}"
        tiles.append(("Reward", ends, "on held-out prompts, before → after RL"))
        kl = spread(one.kl for one in group.rl)
        assert kl is not None
        note = f"nats a completion {plus_minus(kl)}"
        tiles.append(("KL from the reference", decimal(kl.mean), note.strip()))
    auroc = spread(card.auroc for card in group.reward)
    if auroc is not None:
        note = plus_minus(auroc) or "0.5 is a coin, 1 perfect"
        tiles.append(("Reward model AUROC", decimal(auroc.mean), note))
    seconds = group.over_runs(lambda run: sum(stage.seconds for stage in run.stages.values()))
    peak = group.over_runs(lambda run: max((s.peak_memory_bytes for s in run.stages.values()), default=None))
    if seconds is not None and peak is not None:
        each = " a seed" if len(group.runs) > 1 else ""
        note = f"{bytes_text(peak.mean)} of memory at the peak"
        tiles.append((f"Time{each}", seconds_text(seconds.mean), note))
    return tiles


def _policy(group: Group) -> dict[str, Any]:
    """The policy's table and plots."""
    rows = []
    for label, ends_of, interval_of, places, scale in POLICY:
        pairs = [ends_of(one) for one in group.rl]
        before, after = (
            spread(None if end is None else scale * end for end in ends) for ends in zip(*pairs, strict=True)
        )
        interval = interval_of(group.rl[0]) if len(group.rl) == 1 else None
        if interval is not None:
            interval = (scale * interval[0], scale * interval[1])
            places = max(places, places_of(interval[1] - interval[0]))
        elif before is not None and after is not None:
            places = max(places, places_of(max(abs(before.mean), abs(after.mean))))
        if before is not None or after is not None:
            rows.append((label, *(spread_text(end, places) for end in (before, after)), _told(interval, places)))
    reward = reward_change(group.rl)
    ends = (reward.before, reward.after) if reward is not None else ()
    plots = [
        charts.root_kl_plot([group], "root-kl"),
        charts.step_plot(group, "policy", "reward", "Reward", "reward of sampled completions", ends),
        charts.step_plot(group, "policy", "kl", "KL", "nats a completion"),
    ]
    table = _folded(["Figure", "Before RL", "After RL", "Change, 95 %"], rows)
    return {**table, "plots": [plot for plot in plots if plot is not None]}


def _card(by_tuning: Sequence[Group]) -> dict[str, Any]:
    """The reward model card of the first tuning's runs, and the other tuning in a line."""
    group = by_tuning[0]
    cards, first = group.reward, group.reward[0]
    rows = []
    for label, value_of, interval_of in CARD:
        value = spread(value_of(card) for card in cards)
        if value is not None:
            rows.append((label, spread_text(value), _told(interval_of(first) if len(cards) == 1 else None)))
    plots = [
        charts.reliability_plot(first),
        charts.scores_plot(first),
        charts.step_plot(group, "reward", "loss", "Loss in training", "loss"),
    ]
    return {
        **_folded(["Figure", "Value", "95 % interval"], rows),
        "fitness": words.fitness(cards),
        "words": [*words.card_words(cards), reward_line(by_tuning)],
        "first": first,
        "slices": [
            (
                one.by,
                one.name,
                f"{one.n:,}",
                percent(one.share_up),
                NONE if one.auroc is None else decimal(one.auroc),
                _told(one.interval),
                NONE if one.ece is None else decimal(one.ece),
            )
            for one in first.slices
        ],
        "mistakes": [
            ("Bad answers that score high", first.mistakes.downs_scored_high),
            ("Good answers that score low", first.mistakes.ups_scored_low),
        ],
        "plots": [plot for plot in plots if plot is not None],
    }


def _folded(head: list[str], rows: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """A table whose last column is left out where it is empty; what is folded away follows `rows`."""
    width = len(head) if any(row[-1] != NONE for row in rows) else len(head) - 1
    cut = [row[:width] for row in rows]
    return {"head": head[:width], "rows": cut[:SHOWN_FIGURES], "further": cut[SHOWN_FIGURES:]}


def _told(interval: Interval | None, places: int = 2) -> str:
    return NONE if interval is None else interval_text(*interval, places)


def _tunings(by_tuning: Sequence[Group]) -> dict[str, Any]:
    """LoRA beside full tuning."""
    lora, full = by_tuning
    matched = match_all(by_tuning)
    costs, qualities = cost_rows(lora, full), quality_rows(lora, full, matched)
    return {
        "bottom_line": bottom_line(qualities),
        "balance": balance(costs, qualities),
        "costs": [(f"{row.stage}: {row.figure}", *row.cells) for row in costs],
        "qualities": [(row.figure, *row.cells) for row in qualities],
        "plot": charts.root_kl_plot(by_tuning, "tunings", matched.kl if matched else None),
        "matched": matched,
        "seeds": [len(group.runs) for group in by_tuning],
    }


def _shown(sample: Sample) -> dict[str, Any]:
    """The turns of a prompt, earlier ones apart, and the completions in the order of training."""
    turns = [Turn(role="prompt", content=sample.prompt)] if isinstance(sample.prompt, str) else sample.prompt
    cut = max(0, len(turns) - SHOWN_TURNS)
    order = [*(role for role in ROLES if role in sample.answers), *sorted(set(sample.answers) - set(ROLES))]
    answers = [(ROLES.get(role, role), sample.answers[role]) for role in order]
    return {"earlier": turns[:cut], "turns": turns[cut:], "answers": answers}
