"""Evaluation of a policy by its completions of held-out prompts, and comparison of two policies."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from perl.data.records import Judge
from perl.measure.bootstrap import Floats
from perl.measure.paired import Metrics, changes
from perl.results import Completion, Sample
from perl.rl.collector import Collector
from perl.rl.maths import kl_k1, masked_mean
from perl.rl.results import PassAtK, PolicyChange
from perl.rl.rewards.function import messages
from perl.rl.rewards.scale import ROUNDING
from perl.rl.rollout import EncodedPrompts, Rollout
from perl.roles.role import Role
from perl.system.progress import console, counted, doing
from perl.system.typed_json import made

T = TypeVar("T")

EVAL_BATCH = 64
"""Completions sampled at once."""
COMPLETIONS = 256
"""Smallest total number of completions: the mean of only 24 rewards of 0 or 1 has a standard error of 0.1."""
PART = "reward/"
"""Prefix of the names of the reward's parts."""
PASS = "pass@"
"""Prefix of k."""
BINS = 20
"""Bins of the histogram of rewards."""
MOST_A_PROMPT = 32
"""Largest number of completions per prompt; more do not reduce the variance between prompts."""


def samples_per_prompt(prompts: int) -> int:
    """Return the number of completions per prompt in an evaluation on this many prompts."""
    return min(MOST_A_PROMPT, -(-COMPLETIONS // prompts))


def evaluate_policy(
    collector: Collector, role: Role, prompts: EncodedPrompts, judge: Judge | None, *, say_spread: bool = False
) -> dict[str, list[float]]:
    """Measure reward, its parts (`reward/NAME`), gold score, KL to the reference in nats, length and `ended`.

    If the reward has rules, `pass@K` is measured, too; a completion that satisfies all of them is correct. All
    policies sample with the same random numbers.

    Args:
        say_spread: print the distribution of the rewards over the completions.

    Returns:
        for each metric, the mean over each prompt's completions.
    """
    generator, each = collector.generator("evaluate"), collector.eval_samples or samples_per_prompt(len(prompts))
    found: dict[str, list[float]] = {}
    with doing(f"judging {role} on {counted(len(prompts), 'prompt')}"):
        drawn = [of_each(one, judge) for one in rollouts(collector, role, prompts.repeat(each), generator)]
    for metrics in drawn:
        for name, values in metrics.items():
            found.setdefault(name, []).extend(values)
    if say_spread:
        console.print(spread_words(found["reward"]))
    means = {name: prompt_means(values, each) for name, values in found.items()}
    rules = [found[f"{PART}{name}"] for name in collector.reward.rules]
    if rules:
        right = by_prompt([all(values) for values in zip(*rules, strict=True)], each)
        means |= {f"{PASS}{k}": [pass_at_k(values, k) for values in right] for k in measured_ks(each)}
    return means


def rollouts(
    collector: Collector, role: Role, prompts: EncodedPrompts, generator: torch.Generator
) -> Iterator[Rollout]:
    """Yield rollouts of many prompts, batch by batch, with the completions of all processes."""
    for start in range(0, len(prompts), EVAL_BATCH):
        part = prompts.take(range(start, min(start + EVAL_BATCH, len(prompts))))
        yield collector.collect(role, part, generator).gather(collector.processes, part)


def by_prompt(values: Sequence[T], each: int) -> list[Sequence[T]]:
    """Split the values of completions, `each` adjacent ones per prompt, by prompt."""
    return [values[start : start + each] for start in range(0, len(values), each)]


def prompt_means(values: Sequence[float], each: int) -> list[float]:
    """Return each prompt's mean of the values of its completions."""
    return [statistics.fmean(group) for group in by_prompt(values, each)]


def success_rates(
    collector: Collector, role: Role, prompts: EncodedPrompts, each: int, success: float
) -> list[float]:
    """Return the share of each prompt's completions whose reward is at least `success`.

    Args:
        each: completions per prompt.
    """
    generator, asked = collector.generator("difficulty"), prompts.repeat(each)
    right: list[bool] = []
    for rollout in rollouts(collector, role, asked, generator):
        right += (rollout.rewards_B >= success).tolist()
    return prompt_means(right, each)


def spread_words(rewards: list[float]) -> str:
    """Describe a reward's scale before anything is trained on it."""
    std, said = statistics.pstdev(rewards), f"Preflight: the rewards of {len(rewards)} completions before RL"
    if std == 0.0:
        return f"[yellow]{said} are all {rewards[0]:.3g}[/]: as long as they are equal, nothing can be learned."
    mean, low, high = statistics.fmean(rewards), min(rewards), max(rewards)
    if std <= ROUNDING * abs(mean):
        said = f"{said} have a standard deviation of only {std:.3g} around {mean:.3g}"
        return f"[yellow]{said}, which training takes for rounding[/]: subtract a constant from all of them."
    digits = 3 + max(
        0, math.floor(math.log10(max(-low, high) / std))
    )  # rewards may differ little from a large mean
    return f"{said}: mean {mean:.{digits}g}, standard deviation {std:.3g}, {low:.{digits}g} to {high:.{digits}g}."


def pass_at_k(right: Sequence[bool], k: int) -> float:
    """Return pass@k, the probability that at least one of k completions of a prompt is correct.

    This is the unbiased estimate 1 - C(n - c, k) / C(n, k) from n completions, of which c are correct: equation 1
    of Chen et al. 2021 (arXiv 2107.03374). k is at most n.
    """
    n, c = len(right), sum(right)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def measured_ks(n: int) -> list[int]:
    """Return the k that can be measured with n completions per prompt: the powers of two up to n."""
    return [1 << power for power in range(n.bit_length())]


def policy_change(before: Metrics, after: Metrics, prompts: EncodedPrompts, each: int | None) -> PolicyChange:
    """Compare two policies on the same prompts.

    Args:
        before: the result of `evaluate_policy` for the reference.
        after: its result for the policy.
        each: completions per prompt; None: `samples_per_prompt`.
    """
    parts = {
        f"reward_parts_{when}": {
            name.removeprefix(PART): statistics.fmean(values)
            for name, values in metrics.items()
            if name.startswith(PART)
        }
        for when, metrics in (("before", before), ("after", after))
    }
    dialogues = [prompt.dialogue for prompt in prompts.prompts]
    passes = _passes(before, after, dialogues)
    first = {"pass_at_1_before": passes[0].before, "pass_at_1_after": passes[0].after} if passes else {}
    edges = _bin_edges([*before["reward"], *after["reward"]])
    counts = {when: np.histogram(of["reward"], edges)[0] for when, of in (("before", before), ("after", after))}
    histogram = {"edges": edges.tolist()} | {when: count.tolist() for when, count in counts.items()}
    before = {name: values for name, values in before.items() if not name.startswith((PART, PASS))}
    before["kl"] = [0.0] * len(prompts)  # the reference's KL to itself, which rounding may have left above 0
    found = changes(before, after, dialogues)
    kl = found.pop("kl")
    flat = {f"{name}_{key}": value for name, one in found.items() for key, value in vars(one).items()}
    flat |= {"n": len(prompts), "samples_per_prompt": each or samples_per_prompt(len(prompts))}
    flat |= {"kl": kl.after, "kl_interval": kl.interval, "reward_histogram": histogram, "pass_at": passes}
    return made(PolicyChange, flat | first | parts)


def _bin_edges(rewards: Sequence[float]) -> Floats:
    """Return the edges of the histogram's bins; around rewards that differ only by rounding they are wider."""
    low, high = min(rewards), max(rewards)
    rounding = ROUNDING * max(-low, high)
    margin = 0.0 if high - low > rounding else max(0.5, rounding)
    return np.linspace(low - margin, high + margin, BINS + 1)


def _passes(before: Metrics, after: Metrics, dialogues: Sequence[str]) -> list[PassAtK] | None:
    """Return pass@k before and after, in ascending order of k from 1; None without rules."""
    names = [name for name in before if name.startswith(PASS)]
    changed = changes({name: before[name] for name in names}, after, dialogues)
    none = {name: [0.0] * len(dialogues) for name in names}  # the change from 0 is the value itself
    start, end = (changes(none, of, dialogues) for of in (before, after))
    return [
        PassAtK(
            **vars(one),
            k=int(name.removeprefix(PASS)),
            before_interval=start[name].interval,
            after_interval=end[name].interval,
        )
        for name, one in changed.items()
    ] or None


def describe(rollout: Rollout, judge: Judge | None) -> dict[str, float]:
    """Return a rollout's metrics; `kl` is the k1 estimate in nats per completion, `kl_token` in nats per token.

    `gold` is the judge's score, if there is a judge; it is logged and never trained on. `reward/NAME` are the
    parts of the reward.
    """
    kl_BT = kl_k1(rollout.policy_log_probs_BT, rollout.reference_log_probs_BT)
    means = {name: statistics.fmean(values) for name, values in of_each(rollout, judge).items()}
    return means | {"kl_token": float(masked_mean(kl_BT, rollout.completion_mask_BT))}


def of_each(rollout: Rollout, judge: Judge | None) -> dict[str, list[float]]:
    """Return the metrics of each completion."""
    mask_BT = rollout.completion_mask_BT
    kl_BT = kl_k1(rollout.policy_log_probs_BT, rollout.reference_log_probs_BT)
    columns = [rollout.rewards_B, *rollout.reward_parts.values()]
    columns += [kl_BT.masked_fill(~mask_BT, 0.0).sum(1), rollout.ended_B]
    reward, *parts, kl, ended = torch.stack([one_B.double() for one_B in columns]).tolist()  # a GPU waits once
    metrics: dict[str, list[float]] = {"reward": reward}
    metrics |= {f"{PART}{name}": part for name, part in zip(rollout.reward_parts, parts, strict=True)}
    if judge is not None:
        metrics["gold"] = list(judge(rollout.prompts, rollout.texts))
    return metrics | {"kl": kl, "answer_tokens": list(map(float, rollout.completion_lengths)), "ended": ended}


def draw_samples(
    collector: Collector, roles: Sequence[Role], prompts: EncodedPrompts, judge: Judge | None
) -> list[Sample]:
    """Sample one completion per role and prompt, with its reward and the judge's verdict, for people to read."""
    answers: list[dict[str, Completion]] = [{} for _ in prompts.prompts]
    for role in roles:
        local = collector.collect(role, prompts, collector.generator("samples"))
        rollout = local.gather(collector.processes, prompts)
        gold = judge(prompts.prompts, rollout.texts) if judge is not None else None
        for index, text in enumerate(rollout.texts):
            verdict = None if gold is None else float(gold[index])
            answers[index][role] = Completion(text=text, reward=float(rollout.rewards_B[index]), gold=verdict)
    return [
        made(Sample, {"prompt": messages(prompt.context), "answers": given})
        for prompt, given in zip(prompts.prompts, answers, strict=True)
    ]
