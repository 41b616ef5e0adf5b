"""One cell of the grid: a run of the package under default settings, and its result.

`python -m benchmarks.grid.cell FOLDER` runs the cell that FOLDER/plan.json describes, and writes FOLDER/cell.json.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.grid import judge, prompts
from benchmarks.grid.facts import Facts, written
from benchmarks.grid.models import kind_of
from benchmarks.rewards import RewardFunction, animals, cheerful_words, mentions, near_length
from perl.rl.algorithms import ALGORITHMS as ROWS

REWARDS = ("dense", "sparse", "length", "model")
ALGORITHMS: dict[str, dict[str, Any]] = {"default": {}} | {
    name: {"algorithm": name} | ({"prompts_per_step": 4} if row.samples_per_prompt > 1 else {})
    for name, row in ROWS.items()
}
"""Keys that each sets; `default` sets none. All draw 16 completions per step, those with groups in groups of 4."""


@dataclass(frozen=True)
class Plan:
    """All settings of a cell.

    Attributes:
        scale: a factor, optionally with a shift: `100`, `1+1000`.
        base: folder of the model.
        ratings: file of the model's ratings.
        overrides: `KEY=VALUE` for the recipe.
    """

    model: str
    reward: str
    scale: str
    algorithm: str
    seed: int
    steps: int
    max_new_tokens: int
    overrides: list[str]
    base: str
    ratings: str
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the cell and of its folder."""
        return f"{self.model}-{self.reward}-{self.scale}-{self.algorithm}-{self.seed}".replace("+", "p")

    @property
    def factor(self) -> float:
        """Factor on the raw reward."""
        return float(self.scale.partition("+")[0])

    @property
    def shift(self) -> float:
        """Constant added to the scaled reward."""
        return float(self.scale.partition("+")[2] or 0)

    def write(self, folder: Path) -> None:
        """Write the plan into the cell's folder."""
        (folder / "plan.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def run_cell(folder: Path) -> dict[str, Any]:
    """Train and judge a cell, and write cell.json."""
    plan = Plan(**json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    started = time.monotonic()
    status = _train(plan, folder)
    result: dict[str, Any] = {**asdict(plan), "exit": status}
    if status == 0:
        result |= {"run": _reported(folder / "run"), **_judged(plan, folder / "run")}
    result["seconds"] = round(time.monotonic() - started, 1)
    unfinished = folder / "cell.unfinished"
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(folder / "cell.json")
    return result


def write_recipe(plan: Plan, folder: Path) -> Path:
    """Write the recipe of a new user, with its data and its reward function in the same folder."""
    rl: dict[str, Any] = {**ALGORITHMS[plan.algorithm], "steps": plan.steps, "max_new_tokens": plan.max_new_tokens}
    recipe: dict[str, Any] = {"name": plan.name, "seed": plan.seed, "base": {"model": plan.base}}
    if plan.reward == "model":
        recipe |= {"data": {"source": "jsonl", "path": plan.ratings}, "reward": {}}
        rl["anyway"] = True  # the judge evaluates the policy anyway
    else:
        kind = kind_of(plan.model)
        rows = ({"prompt": written(prompt, kind)} for prompt in prompts.training(kind))
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "reward.py").write_text(_function_source(plan), encoding="utf-8")
        recipe |= {"data": {"source": "jsonl", "path": "prompts.jsonl"}}
        rl["reward"] = {"function": "reward.py:reward"}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "rl": rl}, sort_keys=False), encoding="utf-8")
    return file


def _function_source(plan: Plan) -> str:
    function, arguments = _function(plan)
    name = function.__name__
    call = name + "".join(f", {key}={value!r}" for key, value in arguments.items())
    return (
        f"from functools import partial\n\nfrom benchmarks.rewards import {name}, scaled\n\n"
        f"reward = scaled(partial({call}), {plan.factor!r}, {plan.shift!r})\n"
    )


def _function(plan: Plan) -> tuple[RewardFunction, dict[str, Any]]:
    """Return a reward function of benchmarks/rewards.py and its arguments."""
    facts = Facts(**plan.facts)
    of: dict[str, tuple[RewardFunction, dict[str, Any]]] = {
        "dense": (animals, {}),
        "sparse": (mentions, {"word": facts.word}),
        "length": (near_length, {"characters": facts.characters}),
    }
    return of[plan.reward]


def _train(plan: Plan, folder: Path) -> int:
    """Run the package's own commands; return the exit status of the last one that ran."""
    recipe = write_recipe(plan, folder)
    if plan.reward != "model":
        return _perl("run", recipe, *plan.overrides, "--out", folder / "run")
    status = _perl("reward", recipe, *plan.overrides, "--out", folder / "run")
    if status == 0:
        _scale_reward_model(plan, folder / "run" / "reward" / "adapter" / "perl.json")
        status = _perl("run", recipe, *plan.overrides, "--out", folder / "run")
    return status


def _scale_reward_model(plan: Plan, stamp: Path) -> None:
    """Rescale the reward model's scores: RL subtracts this file's mean and divides by its standard deviation."""
    content = json.loads(stamp.read_text(encoding="utf-8"))
    spread = content["reward_std"] / plan.factor
    content |= {"reward_mean": content["reward_mean"] - plan.shift * spread, "reward_std": spread}
    stamp.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _perl(*arguments: object) -> int:
    """Run a `perl-rlhf` command in this process and return its exit status."""
    from perl import cli

    sys.argv = ["perl-rlhf", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


def _reported(run: Path) -> dict[str, Any]:
    """Return the evaluation, time and incidents that the run itself reports for RL."""
    stage = json.loads((run / "report.json").read_text(encoding="utf-8"))["stages"]["rl"]
    incidents = [
        {key: one[key] for key in ("name", "step", "action", "what")} for one in stage.get("incidents", [])
    ]
    return {**stage["eval"], "seconds": stage["seconds"], "incidents": incidents}


def _judged(plan: Plan, run: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    dtype, kind, base = getattr(torch, report["base"]["dtype"]), kind_of(plan.model), Path(plan.base)
    gold = None
    if plan.reward == "model":
        score, gold = judge.by_model(base, run / "reward" / "adapter", dtype), partial(_liked, plan)
    else:
        function, arguments = _function(plan)
        score = judge.by_function(partial(function, **arguments), kind)
    return judge.judge(base, run / "policy" / "adapter", dtype, kind, plan.max_new_tokens, score, gold)


def _liked(plan: Plan, texts: list[str]) -> list[float]:
    """Return 1 where simulated raters without noise would give a thumb up, else 0."""
    at_least = Facts(**plan.facts).cheerful_at_least
    return [float(count >= at_least) for count in cheerful_words(texts)]


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]))
