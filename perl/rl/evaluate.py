"""Judging a policy: its completions of held-out prompts, and what changed from one policy to another."""

import statistics
from typing import Any

import torch

from perl.data.records import Judge
from perl.measure.paired import Metrics, changes
from perl.rl.maths import kl_k1, masked_mean
from perl.rl.prompts import how_to_sample
from perl.rl.rewards.combination import CombinedReward
from perl.rl.rollout import EncodedPrompts
from perl.rl.rollouts import Rollout, everyones, roll_out
from perl.roles.roles import Role
from perl.stages.session import Session
from perl.system.progress import console
from perl.system.seeds import derived_seed

EVAL_BATCH = 64
"""Completions sampled at once."""
COMPLETIONS = 256
"""At least so many in all: the mean of 24 rewards of 0 or 1 has a standard error of 0.1."""
PART = "reward/"
"""Before the name of a part of the reward."""
MOST_A_PROMPT = 32
"""More tell nothing new: what differs from prompt to prompt remains."""


def samples_per_prompt(prompts: int) -> int:
    """How many completions of each of so many prompts are judged."""
    return min(MOST_A_PROMPT, -(-COMPLETIONS // prompts))


def evaluate_policy(
    session: Session, reward: CombinedReward, role: Role, prompts: EncodedPrompts, *, say_spread: bool = False
) -> dict[str, list[float]]:
    """Reward, its parts (`reward/NAME`), gold score, KL to the reference (nats a completion, k1), length, `ended`.

    All policies draw with the same random numbers.

    Args:
        say_spread: print how the rewards are spread over the completions.

    Returns:
        of each prompt the mean over its completions, by name.
    """
    session.roles.eval()
    generator = torch.Generator(session.device).manual_seed(derived_seed(session.recipe.seed, "evaluate", 0))
    sampling, each = how_to_sample(session), samples_per_prompt(len(prompts))
    rows = [prompt for prompt in range(len(prompts)) for _ in range(each)]
    found: dict[str, list[float]] = {}
    for start in range(0, len(rows), EVAL_BATCH):
        part = prompts.take(rows[start : start + EVAL_BATCH])
        mine = roll_out(session, reward, role, part, sampling, generator)
        metrics = _of_each(everyones(session, part, mine), session.held_out.judge)
        for name, values in metrics.items():
            found.setdefault(name, []).extend(values)
    if say_spread:
        console.print(_spread(found["reward"]))
    return {
        name: [statistics.fmean(values[start : start + each]) for start in range(0, len(values), each)]
        for name, values in found.items()
    }


def _spread(rewards: list[float]) -> str:
    """What a reward's scale is, before anything is trained on it."""
    std, said = statistics.pstdev(rewards), f"Preflight: the rewards of {len(rewards)} completions before RL"
    if std == 0.0:
        return f"[yellow]{said} are all {rewards[0]:.3g}[/]: while they are equal there is nothing to learn from."
    low, high = min(rewards), max(rewards)
    return f"{said}: mean {statistics.fmean(rewards):.3g}, standard deviation {std:.3g}, {low:.3g} to {high:.3g}."


def policy_change(before: Metrics, after: Metrics, prompts: EncodedPrompts) -> dict[str, Any]:
    """Two policies on the same prompts, as JSON.

    Args:
        before: what `evaluate_policy` found of the reference.
        after: what it found of the policy.

    Returns:
        `n` prompts and the `samples_per_prompt`; `reward_parts_before` and `reward_parts_after`, the means of the
        reward's parts by name; of reward, gold (where there is a judge), answer_tokens and
        ended the means `NAME_before` and `NAME_after`, and `NAME_interval`, that of the change (95 %, paired by
        prompt); the policy's `kl` with `kl_interval`.
    """
    parts = {
        f"reward_parts_{when}": {
            name.removeprefix(PART): statistics.fmean(values)
            for name, values in metrics.items()
            if name.startswith(PART)
        }
        for when, metrics in (("before", before), ("after", after))
    }
    before = {name: values for name, values in before.items() if not name.startswith(PART)}
    before["kl"] = [0.0] * len(prompts)  # of the reference to itself, where rounding left a little
    found = changes(before, after, [prompt.dialogue for prompt in prompts.prompts])
    del found["kl_before"]
    found["kl"] = found.pop("kl_after")
    return {"n": len(prompts), "samples_per_prompt": samples_per_prompt(len(prompts)), **parts, **found}


def describe(rollout: Rollout, judge: Judge | None) -> dict[str, float]:
    """A rollout in metrics; `kl` is the k1 estimate in nats an answer, `kl_token` in nats a token.

    `gold` is the judge's, where there is one: it is written down and never trained on.
    """
    known = rollout.scored
    kl_BT = kl_k1(known.sampler_log_probs_BT, known.reference_log_probs_BT)
    means = {name: statistics.fmean(values) for name, values in _of_each(rollout, judge).items()}
    return means | {"kl_token": float(masked_mean(kl_BT, known.mask_BT))}


def _of_each(rollout: Rollout, judge: Judge | None) -> dict[str, list[float]]:
    """The metrics of each completion."""
    answers, known = rollout
    kl_BT = kl_k1(known.sampler_log_probs_BT, known.reference_log_probs_BT)
    metrics: dict[str, list[float]] = {
        "reward": answers.rewards_B.tolist(),
        "kl": kl_BT.masked_fill(~known.mask_BT, 0.0).sum(1).tolist(),
        "answer_tokens": known.mask_BT.sum(1).tolist(),
        "ended": answers.samples.ended_B.float().tolist(),
    }
    metrics |= {f"{PART}{name}": part_B.tolist() for name, part_B in answers.reward_parts.items()}
    if judge is not None:
        metrics["gold"] = list(judge(answers.prompts, answers.texts))
    return metrics
