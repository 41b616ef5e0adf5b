"""The page's sections, each as the tables, sentences and plots that the template shows."""

from collections.abc import Callable, Sequence
from typing import Any

from perl.page import words
from perl.page.bars import memory_plot, time_plot, widest_memory
from perl.page.compare import cost_rows, match_all, quality_rows
from perl.page.curves import proxy_gold_plot, step_plot, tunings_plot
from perl.page.numbers import (
    GAP,
    NONE,
    bytes_text,
    count_text,
    flops_text,
    interval_text,
    percent,
    rate_text,
    seconds_text,
    signed,
    spread,
    spread_text,
)
from perl.page.outcome import STAGE, Group
from perl.page.schema import RlEval, Sample, Stage, Turn
from perl.page.tunings import balance, bottom_line

SHOWN_TURNS = 3
"""Earlier turns of a prompt stand in a fold."""
COST_HEAD = (
    "Stage",
    "Trainable parameters",
    "Time",
    "Tokens a second",
    "Peak memory",
    "Peak RSS",
    "Compute",
    "Useful",
)
ROLES = {"base": "Base", "sft": "After SFT", "policy": "After RL"}


def policy(group: Group) -> dict[str, Any] | None:
    """The policy's table and plots; None without RL."""
    if not group.rl:
        return None
    rl = group.rl

    def row(label: str, key: str, places: int = 2, scale: float = 1.0) -> tuple[str, str, str] | None:
        ends = []
        for when in ("before", "after"):
            values = [getattr(one, f"{key}_{when}") for one in rl]
            ends.append(spread(None if value is None else scale * value for value in values))
        if ends[0] is None and ends[1] is None:
            return None
        return (label, spread_text(ends[0], places), spread_text(ends[1], places))

    rows = [
        row("Reward", "reward"),
        row("Gold judge: right, %", "gold", 1, 100.0),
        row("Answer length, tokens", "answer_tokens", 1),
        row("Answers that end by themselves, %", "ended", 1, 100.0),
    ]
    plots = [
        step_plot(group, "policy", "reward", "Reward", "reward of sampled answers"),
        step_plot(group, "policy", "kl", "KL", "nats an answer"),
    ]
    return {
        "rows": [one for one in rows if one is not None],
        "intervals": _interval_words(rl[0]) if len(rl) == 1 else "",
        "algorithm": rl[0].algorithm,
        "critic": rl[0].critic,
        "steps": rl[0].steps,
        "n": rl[0].n,
        "plots": [plot for plot in plots if plot is not None],
        "proxy_gold": proxy_gold_plot(group),
    }


def _interval_words(one: RlEval) -> str:
    """The 95 % intervals of a single run; empty where it has none."""
    ends = [
        ("reward before", one.reward_before_interval, 1, 2),
        ("reward after", one.reward_after_interval, 1, 2),
        ("gold judge before", one.gold_before_interval, 100, 0),
        ("gold judge after", one.gold_after_interval, 100, 0),
    ]
    return "; ".join(
        f"{name} {interval_text(scale * interval[0], scale * interval[1], places)}{'' if places else f'{GAP}%'}"
        for name, interval, scale, places in ends
        if interval is not None
    )


def sft(group: Group) -> dict[str, Any] | None:
    """What SFT came to, and its loss; None without SFT."""
    text, plot = words.sft_words(group), step_plot(group, "sft", "loss", "Loss in SFT", "loss")
    return {"words": text, "plot": plot} if text else None


def cost(by_tuning: Sequence[Group]) -> dict[str, Any]:
    """Memory and time."""
    widest = widest_memory(by_tuning)
    plots = [memory_plot(group, widest) for group in by_tuning] + [time_plot(group) for group in by_tuning]
    # Of one run: seeds cost about the same.
    rows = [(STAGE[name], *_cost_cells(stage)) for name, stage in by_tuning[0].runs[0].stages.items()]
    filled = [place for place in range(len(COST_HEAD)) if any(row[place] != NONE for row in rows)]
    return {
        "plots": [plot for plot in plots if plot is not None],
        "head": [COST_HEAD[place] for place in filled],
        "rows": [[row[place] for place in filled] for row in rows],
        "group": by_tuning[0],
    }


def _cost_cells(stage: Stage) -> list[str]:
    texts: list[tuple[Callable[[float], str], float | None]] = [
        (count_text, stage.trainable_parameters),
        (seconds_text, stage.seconds),
        (rate_text, stage.tokens_per_second),
        (bytes_text, stage.peak_memory_bytes),
        (bytes_text, stage.peak_rss_bytes),
        (flops_text, stage.flops),
        (percent, stage.useful_flops_share),
    ]
    return [NONE if value is None else text(value) for text, value in texts]


def tunings(by_tuning: Sequence[Group]) -> dict[str, Any]:
    """LoRA beside full tuning."""
    lora, full = by_tuning
    matched = match_all(by_tuning)
    cost, quality = cost_rows(lora, full), quality_rows(lora, full, matched)
    return {
        "bottom_line": bottom_line(quality),
        "balance": balance(cost, quality),
        "cost": [(f"{row.stage}: {row.figure}", *row.cells) for row in cost],
        "quality": [
            (
                row.figure,
                spread_text(row.lora, count=True),
                spread_text(row.full, count=True),
                signed(row.difference),
            )
            for row in quality
        ],
        "plot": tunings_plot(by_tuning, matched.kl if matched else None),
        "matched": matched,
    }


def shown(sample: Sample) -> dict[str, Any]:
    turns = [Turn(role="prompt", content=sample.prompt)] if isinstance(sample.prompt, str) else sample.prompt
    cut = max(0, len(turns) - SHOWN_TURNS)
    return {
        "earlier": turns[:cut],
        "turns": turns[cut:],
        "answers": [(ROLES.get(role, role), sample.answers[role]) for role in _in_order(sample)],
    }


def _in_order(sample: Sample) -> list[str]:
    return [*(role for role in ROLES if role in sample.answers), *sorted(set(sample.answers) - set(ROLES))]
