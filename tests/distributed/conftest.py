"""A small recipe for every kind of stage and algorithm, with runs in a single process for comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from perl.recipe import load_recipe
from perl.stages import pipeline
from perl.system.progress import silence
from tests.conftest import BRIEF, DRINKS, write_rows
from tests.tiny import KINDS

RL: dict[str, Any] = {
    **BRIEF,
    "steps": 2,
    "prompts_per_step": 4,
    "max_new_tokens": 12,
    "eval_prompts": 3,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
}
SHARDED_KINDS = ("ia3", "vera", "miss", "series", "parallel")
"""Kinds of adapters other than LoRA that work with engines that shard the base."""
FUNCTION = """
def length(completions, **columns):
    return [float(len(str(text))) for text in completions]
"""


@pytest.fixture(scope="session")
def recipes(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SFT, reward and PPO on one base; then PPO with a separate critic, REINFORCE and RLOO without SFT.

    With seven demonstrations, fourteen ratings and batches of four, an epoch's last batch cannot be divided
    evenly: with four processes, one has no row.
    """
    folder = tmp_path_factory.mktemp("recipes")
    rows: list[Any] = []
    for number, drink in enumerate(DRINKS):
        prompt = [{"role": "user", "content": f"A {drink}, please." + " Thank you." * (number % 3)}]
        rows.append({"prompt": prompt, "completion": f"One {drink}. What size?"})
        rows.append({"prompt": prompt, "completion": f"One {drink}. What size?", "label": True})
        rows.append({"prompt": prompt, "completion": "No.", "label": False})
    write_rows(folder / "rows.jsonl", rows)
    (folder / "rewards.py").write_text(FUNCTION)
    common: dict[str, Any] = {
        "name": "together",
        "checkpoint_every": 1,
        "base": {"model": str(tiny_llama), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 4},
        "data": {"source": "jsonl", "path": "rows.jsonl", "held_out": 0.3},
    }
    parts = [
        {"kind": "function", "function": "rewards.py:length"},
        {"kind": "length", "target": 5, "weight": 0.5},
    ]
    function = RL | {"reward": {"function": "rewards.py:length"}}
    contents = {
        "all": {
            "sft": {"batch_size": 4, "max_length": 64},
            "reward": {"batch_size": 4, "epochs": 1, "max_length": 64},
            "rl": RL | {"algorithm": "ppo", "epochs": 2},
        },
        "adapter": {"checkpoint_activations": True, "rl": function | {"algorithm": "ppo", "critic": "adapter"}},
        "reinforce": {
            "lora": {"rank": 2, "alpha": 4, "layers": "top-half"},
            "rl": function | {"algorithm": "reinforce"},
        },
        "trpo": {"rl": function | {"algorithm": "trpo"}},
        "rloo": {"rl": RL | {"algorithm": "rloo", "samples_per_prompt": 2, "reward": parts}},
        **{
            kind: {"lora": None, "adapter": {"kind": kind, **KINDS[kind]}, "rl": function | {"algorithm": "ppo"}}
            for kind in SHARDED_KINDS
        },
        "full": {"tuning": "full", "rl": function | {"algorithm": "ppo"}},
    }
    files = {}
    for name, content in contents.items():
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(common | content))
    return files


@pytest.fixture(scope="session")
def alone(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the run folders of a single process, each created on first access."""
    folder = tmp_path_factory.mktemp("alone")

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            with silence():
                pipeline.run(load_recipe(recipes[name]), folder / name)
            self[name] = folder / name
            return self[name]

    return Runs()


def result(out: Path, role: str) -> dict[str, Any]:
    """Return a stage's result."""
    content: dict[str, Any] = json.loads((out / role / "result.json").read_text())
    return content
