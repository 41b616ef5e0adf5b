"""The page: findings, plots and tables put into one HTML file that asks nothing of any network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from perl.files import user_named, write_whole
from perl.page import card, incidents, sections, summary, words
from perl.page.compare import prediction_rows
from perl.page.numbers import bytes_text, decimal, seconds_text, signed, spread
from perl.page.outcome import Group, gold_change, groups, recipe_differences, reward_change
from perl.page.runs import Run, read_runs
from perl.page.tunings import other_tuning, prediction_words

SHOWN_SAMPLES = 8
"""Further samples stand in a fold."""


def write_page(runs: Sequence[Path], file: Path) -> Path:
    """Write the page of finished runs.

    Args:
        runs: run folders: seeds of one recipe, under one tuning or both.
        file: where the page goes.

    Returns:
        the file.

    Raises:
        UserError: there are no runs, one is not finished or is broken, or the file cannot be written.
    """
    text = render(read_runs(runs))
    with user_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return file


def render(runs: Sequence[Run]) -> str:
    """The page as text: the same runs give the same text."""
    return filled("page.html.j2", _content(runs))


def filled(template: str, content: Mapping[str, Any]) -> str:
    """One of the package's templates, filled in."""
    environment = Environment(
        loader=PackageLoader("perl", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(seconds=seconds_text, signed=signed, decimal=decimal)
    style = Markup(environment.loader.get_source(environment, "page.css")[0]) if environment.loader else ""
    return environment.get_template(template).render(style=style, **content)


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """All that the template shows."""
    by_tuning = groups(runs)
    main = by_tuning[0]
    first = main.runs[0]
    predictions = prediction_rows(by_tuning)
    tunings = sections.tunings(by_tuning) if len(by_tuning) > 1 else None
    return {
        "name": first.report.name,
        "verdict": words.verdict(main),
        "happenings": incidents.happenings(runs),
        "preflight": incidents.preflight_rows(first),
        "tiles": _tiles(main),
        "summary": summary.summary(main, runs),
        "unchanged": summary.base_unchanged(runs),
        "mixed": [(group.label, keys) for group in by_tuning if (keys := recipe_differences(group.runs))],
        "main": main,
        "runs": [
            (run.path.name, run.report.name, group.label, run.report.seed)
            for group in by_tuning
            for run in group.runs
        ],
        "first": first,
        "policy": sections.policy(main),
        "sft": sections.sft(main),
        "card": card.card(by_tuning),
        "cost": sections.cost(by_tuning),
        "tunings": tunings,
        "predictions": [(row.tuning, row.stage, row.phase, *row.cells) for row in predictions],
        "prediction_words": prediction_words(predictions),
        "other_tuning": other_tuning(main),
        "samples": [sections.shown(sample) for sample in first.samples],
        "shown_samples": SHOWN_SAMPLES,
    }


@dataclass(frozen=True)
class Tile:
    """A key figure."""

    label: str
    value: str
    note: str


def _tiles(group: Group) -> list[Tile]:
    tiles = []
    reward, gold = reward_change(group.rl), gold_change(group.rl)
    if gold is not None:
        tiles.append(Tile("Gold judge: right", words.range_text(gold, True), "share of held-out answers"))
    if reward is not None:
        tiles.append(Tile("Reward", words.range_text(reward, False), "on held-out prompts, before → after RL"))
        kl = spread(one.kl for one in group.rl)
        assert kl is not None
        tiles.append(
            Tile("KL from the reference", decimal(kl.mean), f"nats an answer {words.plus_minus(kl)}".strip())
        )
    auroc = spread(card.auroc for card in group.reward)
    if auroc is not None:
        tiles.append(
            Tile("Reward model AUROC", decimal(auroc.mean), words.plus_minus(auroc) or "0.5 is a coin, 1 perfect")
        )
    seconds = group.over_runs(lambda run: sum(stage.seconds for stage in run.stages.values()))
    peak = group.over_runs(summary.peak_memory)
    if seconds is not None and seconds.mean > 0:
        memory = "" if peak is None else f"{bytes_text(peak.mean)} of memory at the peak"
        tiles.append(Tile("Time", seconds_text(seconds.mean), memory))
    return tiles
