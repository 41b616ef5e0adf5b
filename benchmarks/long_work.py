"""How cost grows with size: prompts of 256 to 2,048 tokens, 1,250 to 10,000 ratings, 250 to 1,000 steps.

    OMP_NUM_THREADS=1 python -m benchmarks.long_work --figure docs/long_work.svg

Measures CPU seconds of one thread for PPO steps on small Llamas with random weights, for reading and splitting
rated turns of the coffee shop, and for whole runs (from recipe to report) of a reward model and of RL.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

import perl
import perl.measure.meter
from perl.bench import work
from perl.data.jsonl import read_jsonl
from perl.data.simulator.source import simulate
from perl.data.splits import split
from perl.predict import TRY, Trial, Tried, trial_session
from perl.recipe import Recipe
from perl.system.allocator import keep_freed_memory
from perl.system.files import user_named

PROMPTS = (256, 512, 1024, 2048)
RATINGS = (1250, 2500, 5000, 10000)
STEPS = 1000
WHOLE_STEPS = (250, 500, 1000)
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
BASE = Path(__file__).parents[1] / "data" / "coffee-base"
Lines = dict[str, dict[int, float]]


class _CpuClock:
    """Replaces the module `time` where phases are timed."""

    perf_counter = staticmethod(time.process_time)


def main() -> None:
    """Measure each kind of work, print the results as JSON and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", type=Path, help="an SVG")
    parser.add_argument("--shrink", type=int, default=1, help="divisor of all sizes, for a quick trial")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    perl.measure.meter.time = _CpuClock  # type: ignore[assignment]
    found: dict[str, Lines] = {}
    with tempfile.TemporaryDirectory() as scratch:
        found["tokens of a prompt"] = prompts([size // asked.shrink for size in PROMPTS], Path(scratch))
        found["ratings"] = ratings([size // asked.shrink for size in RATINGS], Path(scratch))
        found["steps"] = steps(STEPS // asked.shrink, Path(scratch))
        found["ratings of a whole run"] = reward_runs([size // asked.shrink for size in RATINGS], Path(scratch))
        found["steps of a whole run"] = rl_runs([size // asked.shrink for size in WHOLE_STEPS], Path(scratch))
    print(json.dumps(found, indent=1))
    if asked.figure is not None:
        draw(found, asked.figure)


def prompts(sizes: list[int], folder: Path) -> Lines:
    """Measure the second step on four prompts with 16 new tokens each, two rows per micro-batch."""
    found: Lines = {}
    for size in sizes:
        tried = _trial(SMALL, 2, folder, max_prompt_length=size, max_new_tokens=16, micro_batch_size=2)
        for phase, seconds in tried.step_seconds[-1].items():
            found.setdefault(f"{phase}, s", {})[size] = seconds
            found.setdefault(f"{phase}, live MB", {})[size] = tried.memory[phase].peak / 1e6
    return found


def ratings(sizes: list[int], folder: Path) -> Lines:
    """Time reading and splitting a file of each number of ratings."""
    rated, found = _rated(max(sizes)), Lines()
    for size in sizes:
        begin = time.process_time()
        records = read_jsonl(_written(folder / "rated.jsonl", rated[:size]))
        read = time.process_time()
        split(records, 0.2, 0)
        found.setdefault("read, s", {})[size] = read - begin
        found.setdefault("split, s", {})[size] = time.process_time() - read
    return found


def steps(count: int, folder: Path) -> Lines:
    """Time `count` steps on four prompts of 32 tokens with 4 new tokens each; also memory before and after."""
    before = psutil.Process().memory_info().rss / 1e6
    tried = _trial(TINY, count, folder, measured=False, max_prompt_length=32, max_new_tokens=4)
    found: Lines = {"so far, s": {}, "resident, MB": {0: before, count: psutil.Process().memory_info().rss / 1e6}}
    total = 0.0
    for step, phases in enumerate(tried.step_seconds, 1):
        total += sum(phases.values())
        if step % max(1, count // 20) == 0:
            found["so far, s"][step] = total
    return found


def reward_runs(sizes: list[int], folder: Path) -> Lines:
    """Measure whole runs of a reward model for one epoch on each number of ratings, on the base in data/."""
    rated, found = _rated(max(sizes)), Lines()
    for size in sizes:
        file = _written(folder / "rated.jsonl", rated[:size])
        content = {
            "base": {"model": str(BASE), "dtype": "float32"},
            "reward": {"epochs": 1, "batch_size": 32, "max_length": 384},
        }
        _whole_run(content | {"data": {"source": "jsonl", "path": str(file)}}, size, folder, found)
    return found


def rl_runs(sizes: list[int], folder: Path) -> Lines:
    """Measure whole runs of RL with each number of steps on four short prompts."""
    found = Lines()
    for size in sizes:
        content = _rl_recipe(TINY, folder, max_prompt_length=32, max_new_tokens=4, steps=size)
        _whole_run(content, size, folder, found)
    return found


def _whole_run(content: dict[str, Any], size: int, folder: Path, found: Lines) -> None:
    begin = time.process_time()
    stages = perl.run(Recipe.model_validate({"name": "long"} | content), folder / f"{next(iter(found), '')}{size}")
    found.setdefault("whole run, s", {})[size] = time.process_time() - begin
    result = stages.reward or stages.rl
    assert result is not None
    found.setdefault("training, live MB", {})[size] = result.peak_memory_bytes / 1e6
    found.setdefault("resident, MB", {})[size] = psutil.Process().memory_info().rss / 1e6


def _rated(count: int) -> list[dict[str, Any]]:
    """Return rows of rated turns as plain text."""
    return [
        {
            "prompt": "\n".join(turn.text for turn in one.context),
            "completion": one.answer.text,
            "label": one.label,
        }
        for one in simulate(0, dialogues=0, ratings=count, prompts=1, noise=0.1).ratings
    ]


def _trial(shape: dict[str, int], count: int, folder: Path, measured: bool = True, **rl: Any) -> Tried:
    content = _rl_recipe(shape, folder, **rl)
    with trial_session(Recipe.model_validate(content), Trial(count, measured=measured)) as session:
        return TRY["rl"](session)


def _rl_recipe(shape: dict[str, int], folder: Path, **rl: Any) -> dict[str, Any]:
    text = "coffee milk large please sugar cold " * 700  # longer than any limit, so that it is truncated
    file = _written(folder / "prompts.jsonl", [{"prompt": f"{row} {text}"} for row in range(16)])
    content = work.recipe("100m", "lora", "all", 1, checkpointing=False)
    content["base"]["config"] |= shape | {"num_key_value_heads": shape["num_attention_heads"]}
    content["base"]["config"] |= {"max_position_embeddings": 4096}
    content["base"]["dtype"] = "float32"  # many CPUs only emulate bfloat16
    content["data"] = {"source": "jsonl", "path": str(file)}
    del content["reward"]
    reward = folder / "letters.py"
    reward.write_text("def letters(completions, **kwargs):\n    return [len(set(text)) for text in completions]\n")
    content["rl"] |= {"prompts_per_step": 4, "reward": {"function": f"{reward}:letters"}} | rl
    return content


def _written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def draw(found: dict[str, Lines], file: Path) -> None:
    """Draw seconds above memory, in one column per kind of work."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(2, len(found))
    for column, (kind, lines) in enumerate(found.items()):
        for row, unit in enumerate(("s", "MB")):
            chosen = {name: points for name, points in lines.items() if name.endswith(unit)}
            axes[row][column].set_visible(bool(chosen))
            for name, points in chosen.items():
                axes[row][column].plot(list(points), list(points.values()), "o-", markersize=3, label=name)
            axes[row][column].set(xlabel=kind, xlim=0, ylim=0)
            axes[row][column].grid(alpha=0.3)
            if chosen:
                axes[row][column].legend(fontsize=7)
    with user_named(file):
        figure.savefig(file, format="svg")


if __name__ == "__main__":
    main()
