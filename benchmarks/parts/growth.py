"""How cost grows: time with batch and completion length, memory with batch and (log-probs) vocabulary."""

import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from perl.bench import work
from perl.measure.memory import LiveBytes
from perl.predict import TRY, Trial, Tried, trial_session
from perl.recipe import Recipe
from perl.roles.log_probs import log_probs_and_entropy, tokens_at_once
from perl.system.files import user_named

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
BATCHES = (8, 16, 32, 64)
ANSWERS = (32, 64, 128, 256)
VOCABULARIES = (4096, 16384, 65536, 262144)
TOKENS, WIDTH = 1024, 64


def measure(figure: Path | None) -> dict[str, Any]:
    """Measure seconds and bytes at each size; draw them into an SVG if `figure` is given."""
    found: dict[str, Any] = {
        "seconds by batch": {size: _seconds(size, 64) for size in BATCHES},
        "seconds by answer tokens": {length: _seconds(16, length) for length in ANSWERS},
        "peak bytes of the update by batch": {size: _update_peak(size) for size in BATCHES},
        "peak bytes of log-probs by vocabulary": {size: _log_probs_peak(size) for size in VOCABULARIES},
    }
    if figure is not None:
        _draw(found, figure)
    return found


def _trial(batch: int, answer_tokens: int, trial: Trial) -> Tried:
    content = work.recipe("100m", "lora", "all", 1, checkpointing=False)
    content["base"]["config"] |= {**SHAPE, "num_key_value_heads": SHAPE["num_attention_heads"]}
    content["rl"] |= {"prompts_per_step": batch, "max_new_tokens": answer_tokens}
    recipe = Recipe.model_validate(content)
    with trial_session(recipe, trial) as session:
        return TRY["rl"](session)


def _seconds(batch: int, answer_tokens: int) -> float:
    steps = _trial(batch, answer_tokens, Trial(4, measured=False)).step_seconds
    return float(statistics.median(sum(step.values()) for step in steps[1:]))


def _update_peak(batch: int) -> int:
    return _trial(batch, 64, Trial(2)).memory["update"].peak


def _log_probs_peak(vocabulary: int) -> int:
    """Return the peak bytes of forward and backward, without the head's weight and the hidden states."""
    weight_VD = torch.randn(vocabulary, WIDTH)
    hidden_ND = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets_N = torch.randint(vocabulary, (TOKENS,))
    with LiveBytes() as live:
        log_probs_N, entropy_N = log_probs_and_entropy(
            hidden_ND, weight_VD, None, targets_N, 1.0, tokens_at_once(vocabulary)
        )
        (log_probs_N.sum() + entropy_N.sum()).backward()  # type: ignore[no-untyped-call]
    return live.peak


def _draw(found: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        unit = 1e6 if "bytes" in title else 1.0
        values = [value / unit for value in points.values()]
        axes.plot(list(points), values, marker="o")
        axes.set_title(title.replace("bytes", "MB"), fontsize=10)
        axes.set_ylim(0, 1.15 * max(values))
        if "vocabulary" in title:
            axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    with user_named(file):
        figure.savefig(file, format="svg")
