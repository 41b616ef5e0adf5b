"""Kill runs at random moments with SIGKILL, resume them, and compare their weights with an uninterrupted run's.

    python -m tests.killing --count 20 --seed 0

Each stage is killed `count` times, every third time while a checkpoint is being written. A run that ends before it
can be killed is compared and started again. The killed processes are forks of this one, which saves the imports.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import yaml

from perl import cli
from perl.recipe import STAGES, StageName
from perl.runs.folder import STAGE_ROLE
from perl.stages import pipeline  # noqa: F401  imported once, for all forks

GOODS = ["latte", "mocha", "espresso", "cappuccino", "tea", "juice", "water", "cocoa", "cider", "milk"]
RECIPE: dict[str, Any] = {
    "name": "killed",
    "checkpoint_every": 3,
    "base": {"build": {"hidden_size": 32, "layers": 4, "heads": 2, "vocabulary": 320, "steps": 20}},
    "lora": {"rank": 4, "dropout": 0.1, "layers": "top-half"},
    "data": {"source": "jsonl", "path": "rows.jsonl", "held_out": 0.3},
    "sft": {"epochs": 6, "batch_size": 4},
    "reward": {"epochs": 4, "batch_size": 4},
    "rl": {
        "algorithm": "ppo",
        "anyway": True,
        "critic": "adapter",
        "epochs": 2,
        "steps": 20,
        "prompts_per_step": 8,
        "max_new_tokens": 16,
        "eval_prompts": 8,
        "learning_rate": 1e-3,
    },
}


def shorter() -> dict[str, Any]:
    """Return the recipe with a third of the steps and a checkpoint after every second one."""
    stages = {
        "sft": RECIPE["sft"] | {"epochs": 2},
        "reward": RECIPE["reward"] | {"epochs": 1},
        "rl": RECIPE["rl"] | {"steps": 6, "max_new_tokens": 8},
    }
    return RECIPE | stages | {"checkpoint_every": 2}


def prepare(folder: Path, content: dict[str, Any]) -> Path:
    """Write a recipe of all stages on few rows, and its caches next to it."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    rows = []
    for good in GOODS:
        for size in ("small", "large", "huge"):
            prompt = [{"role": "user", "content": f"A {size} {good}, please."}]
            rows.append({"prompt": prompt, "completion": f"One {size} {good}. Is that all?"})
            rows.append({"prompt": prompt, "completion": f"One {size} {good}.", "label": True})
            rows.append({"prompt": prompt, "completion": "No.", "label": False})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    return recipe


def start(recipe: Path, stage: str, out: Path) -> int:
    """Fork a process that runs one stage, and return its process id."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException), open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = ["perl-rlhf", stage, str(recipe), "--out", str(out)]
        try:
            cli.main()
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))
        os._exit(0)
    os._exit(1)


def finish(recipe: Path, stage: str, out: Path) -> float:
    """Run a stage without interruption, and return its seconds."""
    begin = time.perf_counter()
    _, status = os.waitpid(start(recipe, stage, out), 0)
    assert status == 0, out.with_suffix(".log").read_text(encoding="utf-8")
    return time.perf_counter() - begin


def learned(out: Path) -> dict[str, bytes]:
    """Return the bytes of all trained weights."""
    return {
        str(file.relative_to(out)): file.read_bytes() for file in out.glob("*/adapter/adapter_model.safetensors")
    }


def killed(child: int, folder: Path, seconds: float, saving: bool, rng: random.Random) -> str | None:
    """Kill a process at a random moment within `seconds`; return what it was doing, None if it had ended.

    Args:
        folder: folder of its checkpoints.
        saving: whether to wait for the first unfinished checkpoint after that moment.
    """
    moment, unfinished = time.perf_counter() + rng.uniform(0, seconds), False
    while time.perf_counter() < moment or (saving and not unfinished):
        unfinished = any(folder.glob(".step-*.unfinished"))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the run failed: status {status}, see the log beside {folder.parent.parent}"
            return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "saving" if any(folder.glob(".step-*.unfinished")) else "running"


def kill_stage(
    recipe: Path, stage: StageName, peaceful: Path, seconds: float, count: int, rng: random.Random
) -> dict[str, int]:
    """Kill one stage repeatedly; return how often it was running, saving, and compared with the uninterrupted run.

    Args:
        seconds: seconds that the stage takes without interruption.
    """
    out = peaceful.with_name(f"killed-{stage}")
    told = {"running": 0, "saving": 0, "compared": 0}
    earlier = [STAGE_ROLE[one] for one in STAGES[: STAGES.index(stage)]]

    def anew() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        shutil.copy(peaceful / "recipe.yaml", out)
        for role in earlier:
            shutil.copytree(peaceful / role, out / role)

    def compare() -> None:
        ours = learned(out)
        theirs = {name: content for name, content in learned(peaceful).items() if name in ours}
        assert ours == theirs, f"{stage}: {sorted(name for name in ours if ours[name] != theirs.get(name))} differ"
        told["compared"] += 1

    anew()
    folder = out / STAGE_ROLE[stage] / "checkpoints"
    while told["running"] + told["saving"] < count:
        child = start(recipe, stage, out)
        doing = killed(child, folder, seconds, rng.random() < 1 / 3, rng)
        if doing is None:
            compare()
            anew()
            continue
        told[doing] += 1
        for checkpoint in folder.glob("step-*"):
            content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            assert content["sha256"] == hashlib.sha256((checkpoint / "state.safetensors").read_bytes()).hexdigest()
    finish(recipe, stage, out)
    compare()
    return told


def main() -> None:
    """Kill every stage and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a third of the steps")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = prepare(Path(scratch), shorter() if arguments.short else RECIPE)
        peaceful = Path(scratch) / "peaceful"
        seconds = {stage: finish(recipe, stage, peaceful) for stage in STAGES}
        for stage in STAGES:
            told = kill_stage(recipe, stage, peaceful, seconds[stage], arguments.count, rng)
            print(
                f"{stage}: killed {told['running']} times while running and {told['saving']} while saving; "
                f"{told['compared']} runs ended in the same bytes"
            )


if __name__ == "__main__":
    main()
