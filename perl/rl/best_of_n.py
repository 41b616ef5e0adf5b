"""Best-of-n: of n completions of the policy before RL, the one with the highest reward.

It needs no training and is the baseline that RL has to beat at an equal KL (Gao et al. 2023, arXiv 2210.10760).
"""

import math
from collections.abc import Sequence
from typing import Any

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

FEWEST_PROMPTS = 16
"""Smallest number of prompts; fewer would show little."""


def best_of_n_kl(n: int) -> float:
    """Return the KL to the sampled policy or its bound (Beirami et al. 2024): log n - (n - 1) / n, in nats."""
    return math.log(n) - (n - 1) / n


def chances_of_best(drawn: int, n: int) -> Floats:
    """Return, for completions in ascending order of reward, each one's probability to be the best of n."""
    return np.array([math.comb(rank, n - 1) / math.comb(drawn, n) for rank in range(drawn)])


def best_of_n(
    collector: Collector, role: Role, prompts: EncodedPrompts, judge: Judge | None, most: int, policy: Metrics
) -> list[BestOfN]:
    """Compare best-of-n, for n = 2, 4, 8 and so on up to `most`, with RL's policy on the same prompts.

    All are computed from the same `most` completions per prompt, as means over all subsets of n. The number of
    prompts is such that there are as many completions as in one evaluation: more would take a fifth of a default
    run's time.

    Args:
        policy: the result of `evaluate_policy` for RL's policy on these prompts.
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
    found: dict[str, Any] = {}
    for name, one in changes({name: list(of) for name, of in best.items()}, policy, dialogues).items():
        found |= {name: one.before, f"rl_{name}": one.after, f"{name}_interval": one.interval}
    return BestOfN(n=n, kl=best_of_n_kl(n), prompts=len(dialogues), **found)
