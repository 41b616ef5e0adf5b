"""Reward training over several epochs: full tuning, LoRA on all blocks, LoRA on the upper half (lower cached)."""

import statistics
from dataclasses import replace
from typing import Any

from perl.bench import work
from perl.predict import TRY, Trial, trial_session
from perl.recipe import Recipe

ROWS, EPOCHS, BATCH = 32, 4, 4
CASES = {"full": ("full", "all"), "LoRA, all blocks": ("lora", "all"), "LoRA, upper half": ("lora", "top-half")}


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Measure the seconds of all epochs and of one after the first: medians over interleaved repeats."""
    runs: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, (tuning, layers) in CASES.items():
            runs[name].append(_seconds(model, tuning, layers))
    steps = ROWS // BATCH
    found: dict[str, Any] = {}
    for name, seconds in runs.items():
        later = [
            sum(run[start : start + steps]) for run in seconds for start in range(steps, steps * EPOCHS, steps)
        ]
        found[name] = {
            "seconds": statistics.median(sum(run) for run in seconds),
            "seconds_of_a_later_epoch": statistics.median(later),
        }
    for name in CASES:
        found[name]["times_as_fast_as_full"] = found["full"]["seconds"] / found[name]["seconds"]
    return found


def _seconds(model: str, tuning: str, layers: str) -> list[float]:
    content = work.recipe(model, tuning, layers, 1, checkpointing=False)
    length = work.PROMPT_TOKENS + work.ANSWER_TOKENS
    content["reward"] = {"epochs": EPOCHS, "batch_size": BATCH, "max_length": length}
    recipe = Recipe.model_validate(content)
    with trial_session(recipe, Trial(EPOCHS * ROWS // BATCH, measured=False)) as session:
        longest = sorted(session.train.ratings, key=lambda rating: -sum(len(turn.text) for turn in rating.context))
        of_class = ([rating for rating in longest if rating.label is label] for label in (True, False))
        some = [rating for ratings in of_class for rating in ratings[: ROWS // 2]]
        session.train = replace(session.train, ratings=some)
        tried = TRY["reward"](session)
    return [sum(step.values()) for step in tried.step_seconds]
