"""Normalisation of rewards of any scale by the running mean and standard deviation of all rewards seen.

A user's reward may lie in [0, 1] or in [-300, 300]. The objective `(1-β) r - β KL`, the critic's targets and the
penalty for a missing end of turn all compare it with quantities of a fixed scale. Training therefore uses
`(r - mean) / std` over all rewards of the run so far (as PPO's reference code does with returns: openai/baselines,
`VecNormalize`; rewards are terminal here, so both are the same). Reports contain raw rewards.

The statistics cover the whole run and not a window: once a policy has learned all there is to learn, nearly equal
rewards stay nearly equal instead of being stretched to a standard deviation of 1. One absurd reward would make all
others equal for the rest of the run, so rewards are clipped to `FARTHEST` standard deviations from the mean.

Axis letter: B completions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-6
"""A standard deviation below this share of the rewards' size is rounding."""
FARTHEST = 10.0
"""Standard deviations from the mean to which rewards are clipped. A reward that one completion in a hundred earns
lies 9.9 from it; a rarer one increases the standard deviation as it becomes less rare."""
RARE = 0.05
"""Share of the first rewards above which distant ones do not count as outliers."""
ABSURD = 100.0
"""Standard deviations from the mean above which a reward is an error rather than rare."""
SIGMAS = 1.4826
"""Ratio of standard deviation to median absolute deviation of a normal distribution."""


@dataclass
class RewardScale:
    """Running mean and variance of rewards (Chan, Golub & LeVeque 1979); plain numbers, part of the checkpoint."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    @property
    def std(self) -> float:
        """Standard deviation of all rewards seen; 0 while they are all equal up to rounding."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > ROUNDING * abs(self.mean) else 0.0

    def within(self, rewards_B: Tensor) -> Tensor:
        """Return the rewards, fp64, with outliers clipped.

        The first rewards are compared with one another, later ones with all earlier rewards.
        """
        rewards_B = rewards_B.double()
        middle, spread = self.mean, self.std
        if spread == 0.0:
            middle = float(rewards_B.median())
            spread = SIGMAS * float((rewards_B - middle).abs().median())
        if spread <= ROUNDING * abs(middle):  # most are equal, so there is no scale for outliers yet
            return rewards_B
        near_B = rewards_B.clamp(middle - FARTHEST * spread, middle + FARTHEST * spread)
        # If rewards have two levels with small differences within each, the median distance sees only one level.
        several = self.std == 0.0 and int((near_B != rewards_B).sum()) > max(1.0, RARE * len(rewards_B))
        return rewards_B if several else near_B

    def absurd(self, rewards_B: Tensor) -> float | None:
        """Return the reward farthest from the mean of earlier ones, if it is too far to be merely rare."""
        distance_B = (rewards_B.double() - self.mean).abs()
        farthest = int(distance_B.argmax())
        absurd = self.std > 0.0 and float(distance_B[farthest]) > ABSURD * self.std
        return float(rewards_B[farthest]) if absurd else None

    def update(self, rewards_B: Tensor) -> None:
        """Add the rewards of a rollout, with outliers clipped, to the statistics."""
        rewards_B = rewards_B.double()
        count, mean = len(rewards_B), float(rewards_B.mean())
        squares = float((rewards_B - mean).square().sum())
        total, difference = self.count + count, mean - self.mean
        self.squares += squares + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    def normalized(self, rewards_B: Tensor) -> Tensor:
        """Return the rewards in standard deviations from the mean, fp32; 0 while all rewards have been equal."""
        if self.std == 0.0:
            return torch.zeros_like(rewards_B, dtype=torch.float32)
        return ((rewards_B.double() - self.mean) / self.std).float()
