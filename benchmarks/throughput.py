"""Throughput per process of several compared with one: python -m benchmarks.throughput [--processes N]

One thread and the same number of rows per process, so the global batch grows with the processes. PPO with a shared
critic on a random Llama of 22M parameters; tokens per second and process, as in reports.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import yaml

from tests.distributed.launching import finished, torchrun

SHAPE = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
}


def recipe(folder: Path, processes: int) -> Path:
    """Write a recipe of RL in the coffee shop, with 16 prompts per process."""
    (folder / "rewards.py").write_text("def one(completions, **rest):\n    return [1.0 for _ in completions]\n")
    content = {
        "name": "throughput",
        "checkpoint_every": 1000,
        "base": {"config": SHAPE, "random_init": True, "dtype": "float32"},
        "rl": {
            "algorithm": "ppo",
            "reward": {"function": "rewards.py:one"},
            "steps": 6,
            "prompts_per_step": 16 * processes,
            "micro_batch_size": 16,
            "max_prompt_length": 128,
            "max_new_tokens": 32,
            "eval_prompts": 2,
            "guard": "off",
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def measure(engine: str, processes: int) -> float:
    """Return tokens per second and process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = ["-m", "perl", "run", recipe(Path(scratch), processes), "--out", out]
        status, said = finished(torchrun(processes, *command, engine=engine))
        assert status == 0, said
        result = json.loads((out / "policy" / "result.json").read_text())
    return float(result["tokens_per_second"]) / processes


def main() -> None:
    """Measure one process and several in alternation, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[int, list[float]] = {1: [], arguments.processes: []}
    for _ in range(arguments.repeats):
        for processes, metrics in found.items():
            metrics.append(measure(arguments.engine, processes))
            print(f"{processes} processes: {metrics[-1]:.0f} tokens/s each", flush=True)
    one, each = statistics.median(found[1]), statistics.median(found[arguments.processes])
    words = f"{arguments.engine}: one process {one:.0f}, each of {arguments.processes} {each:.0f} tokens/s"
    print(f"{words}, ratio {each / one:.2f}; all: {found}")


if __name__ == "__main__":
    main()
