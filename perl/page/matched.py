"""Reward at matched KL: what policies have gained when they are equally far from where they began.

A policy that has moved further from the reference has had more room to raise its reward, so figures at the end
of training do not compare two ways of training fairly; figures at the same KL do (Gao, Schulman and Hilton 2022,
"Scaling Laws for Reward Model Overoptimization", plot all against √KL). Here, with k_s and r_s the KL and reward
of step s, both smoothed:

    K    = min over runs of max over s of k_s           the largest KL that all runs reached
    s*   = the first step with k_s ≥ K
    r(K) = r_{s*-1} + (K - k_{s*-1}) / (k_{s*} - k_{s*-1}) · (r_{s*} - r_{s*-1})

and likewise for gold. Where the first step is at K or beyond already, r(K) is its reward. These are rewards of
answers sampled in training, not of the held-out prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perl.page.runs import Series

LEAST_STEPS = 5
"""A shorter curve says nothing."""


@dataclass(frozen=True)
class Curve:
    """KL, reward and gold (NaN where there is none) of each step, smoothed."""

    kl: Series
    reward: Series
    gold: Series


@dataclass(frozen=True)
class Matched:
    """Reward and gold of each run at one KL."""

    kl: float
    rewards: tuple[float, ...]
    golds: tuple[float | None, ...]


def window(steps: int) -> int:
    """How many steps the moving mean takes in: a tenth of all, odd, and three at least."""
    return max(3, steps // 10 | 1)


def smooth(values: Series) -> Series:
    """The centred moving mean over `window` steps, fewer at either end; steps without a value are left out."""
    half, known = window(len(values)) // 2, np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(known, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(known.astype(np.float64), kernel)[half : half + len(values)]
    mean: Series = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return mean


def curve(metrics: Mapping[str, Series]) -> Curve | None:
    """The smoothed curve of a policy's metrics; None with fewer than five steps that have KL and reward."""
    if "kl" not in metrics or "reward" not in metrics:
        return None
    kl, reward = metrics["kl"], metrics["reward"]
    known = np.isfinite(kl) & np.isfinite(reward)
    if known.sum() < LEAST_STEPS:
        return None
    gold = metrics.get("gold", np.full(len(kl), np.nan))
    return Curve(smooth(kl[known]), smooth(reward[known]), smooth(gold[known]))


def at_kl(kl: Series, values: Series, target: float) -> float | None:
    """The value where the KL first reaches the target, between steps by a straight line; None if it never does."""
    known = np.isfinite(values)
    kl, values = kl[known], values[known]
    reached = np.flatnonzero(kl >= target)
    if len(reached) == 0:
        return None
    step = int(reached[0])
    if step == 0:
        return float(values[0])
    share = (target - kl[step - 1]) / (kl[step] - kl[step - 1])
    return float(values[step - 1] + share * (values[step] - values[step - 1]))


def match(curves: Sequence[Curve | None]) -> Matched | None:
    """Reward and gold of all runs at the largest KL that all reached; None if a curve is missing."""
    known = [one for one in curves if one is not None]
    if not known or len(known) < len(curves):
        return None
    target = min(float(one.kl.max()) for one in known)
    rewards = [at_kl(one.kl, one.reward, target) for one in known]
    golds = [at_kl(one.kl, one.gold, target) for one in known]
    return Matched(target, tuple(reward for reward in rewards if reward is not None), tuple(golds))
