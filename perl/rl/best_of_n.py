"""Best-of-n: of n completions by the policy that RL began with, the one with the highest reward.

It needs no training and is the baseline that RL has to beat at an equal KL (Gao et al. 2023, arXiv 2210.10760).
"""

import math
from collections.abc import Sequence

import numpy as np

from perl.data.records import Judge
from perl.measure.bootstrap import Floats
from perl.measure.paired import Metrics, changes
from perl.rl.collector import Collector
from perl.rl.evaluate import COMPLETIONS, rollouts
from perl.rl.results import BestOfN
from perl.rl.rollout import EncodedPrompts
from perl.roles.role import Role
from perl.system.progress import counted, doing
from perl.system.typed_json import made

FEWEST_PROMPTS = 16
"""Fewer would say little."""


def best_of_n_kl(n: int) -> float:
    """The KL to the policy drawn from, or a bound of it (Beirami et al. 2024): log n - (n - 1) / n, in nats."""
    return math.log(n) - (n - 1) / n


def chances_of_best(drawn: int, n: int) -> Floats:
    """Of so many completions in rising order of reward, the chance of each to be the best of n of them."""
    return np.array([math.comb(rank, n - 1) / math.comb(drawn, n) for rank in range(drawn)])


def best_of_n(
    collector: Collector, role: Role, prompts: EncodedPrompts, judge: Judge | None, most: int, policy: Metrics
) -> list[BestOfN]:
    """Best-of-n for n = 2, 4, 8 and so on up to `most`, beside the policy that RL made, on the same prompts.

    All come from the same `most` completions of each prompt: the mean over all subsets of n. There are as many
    prompts as make one evaluation's number of completions: more would take a fifth of a default run's time.

    Args:
        policy: what `evaluate_policy` found of it on these prompts.
    """
    count = min(len(prompts), max(FEWEST_PROMPTS, COMPLETIONS // most))
    asked = prompts.take(range(count))
    metrics: dict[str, list[float]] = {"reward": [], "gold": []}
    with doing(f"best of {most} on {counted(count, 'prompt')}"):
        for rollout in rollouts(collector, role, asked.repeat(most), collector.generator("best of n")):
            metrics["reward"] += rollout.rewards_B.tolist()
            metrics["gold"] += judge(rollout.prompts, rollout.texts) if judge is not None else []
    by_prompt = {name: np.array(values).reshape(count, most) for name, values in metrics.items() if values}
    order = by_prompt["reward"].argsort(1, kind="stable")
    ranked = {name: np.take_along_axis(values, order, 1) for name, values in by_prompt.items()}
    dialogues = [prompt.dialogue for prompt in asked.prompts]
    ours = {name: policy[name][:count] for name in ranked}
    sizes = [2**power for power in range(1, most.bit_length())]
    return [
        _beside(n, {name: rows @ chances_of_best(most, n) for name, rows in ranked.items()}, ours, dialogues)
        for n in sizes
    ]


def _beside(n: int, best: dict[str, Floats], policy: Metrics, dialogues: Sequence[str]) -> BestOfN:
    found: dict[str, object] = dict(changes({name: list(of) for name, of in best.items()}, policy, dialogues))
    for name in policy:
        found[f"rl_{name}"] = found.pop(f"{name}_after")
        found[name] = found.pop(f"{name}_before")
    return made(BestOfN, {"n": n, "kl": best_of_n_kl(n), "prompts": len(dialogues), **found})
