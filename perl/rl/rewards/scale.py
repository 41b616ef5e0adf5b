"""Rewards of any scale: the running mean and spread of all rewards seen, by which they are normalised.

A user's reward may lie in [0, 1] or in [-300, 300]. The objective `(1-β) r - β KL`, the critic's targets and the
penalty for a missing end of turn all weigh it against something that has a scale of its own. So the reward that
training sees is `(r - mean) / std`, over all rewards of the run so far (as PPO's reference code does with returns:
openai/baselines, `VecNormalize`; here rewards are terminal, so both are the same). What is reported stays raw.

The statistics are over the whole run and not over a window: where a policy has learned all there is to learn,
nearly equal rewards stay nearly equal, instead of being stretched to a spread of 1. One absurd reward would make
all others equal for the rest of the run, so rewards count as lying at most `FARTHEST` spreads from the mean.

Axis letter: B completions.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-6
"""A spread smaller than this share of the rewards' size is rounding."""
FARTHEST = 10.0
"""Spreads from the mean that a reward counts as at most. One that a completion in a hundred earns lies 9.9 from
it; what is rarer widens the spread as it becomes less rare."""
RARE = 0.05
"""Of the first rewards, a share of outliers above which they are none."""
ABSURD = 100.0
"""Spreads from the mean beyond which a reward is a mistake rather than rare."""
SIGMAS = 1.4826
"""Of a normal distribution, the standard deviation over the median distance from the median."""


@dataclass
class RewardScale:
    """Running mean and spread of rewards (Chan, Golub & LeVeque 1979); plain numbers, part of the checkpoint."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    @property
    def std(self) -> float:
        """Spread of all rewards seen; 0 while they are all equal up to rounding."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > ROUNDING * abs(self.mean) else 0.0

    def within(self, rewards_B: Tensor) -> Tensor:
        """The rewards, fp64, outliers moved to where they count.

        The first rewards are compared with one another, later ones with all before them.
        """
        rewards_B = rewards_B.double()
        middle, spread = self.mean, self.std
        if spread == 0.0:
            middle = float(rewards_B.median())
            spread = SIGMAS * float((rewards_B - middle).abs().median())
        if spread <= ROUNDING * abs(middle):  # most are equal: nothing says yet how far is far
            return rewards_B
        near_B = rewards_B.clamp(middle - FARTHEST * spread, middle + FARTHEST * spread)
        # Of two levels with a small difference within them, the median distance sees only the one.
        several = self.std == 0.0 and int((near_B != rewards_B).sum()) > max(1.0, RARE * len(rewards_B))
        return rewards_B if several else near_B

    def absurd(self, rewards_B: Tensor) -> float | None:
        """The reward that lies farthest from the mean of those before, if that is too far to be but rare."""
        distance_B = (rewards_B.double() - self.mean).abs()
        farthest = int(distance_B.argmax())
        absurd = self.std > 0.0 and float(distance_B[farthest]) > ABSURD * self.std
        return float(rewards_B[farthest]) if absurd else None

    def update(self, rewards_B: Tensor) -> None:
        """Count the rewards of a rollout in, outliers moved."""
        rewards_B = rewards_B.double()
        count, mean = len(rewards_B), float(rewards_B.mean())
        squares = float((rewards_B - mean).square().sum())
        total, difference = self.count + count, mean - self.mean
        self.squares += squares + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    def normalized(self, rewards_B: Tensor) -> Tensor:
        """The rewards in standard deviations from the mean, fp32; 0 while no reward has differed from another."""
        if self.std == 0.0:
            return torch.zeros_like(rewards_B, dtype=torch.float32)
        return ((rewards_B.double() - self.mean) / self.std).float()

    def state_dict(self) -> dict[str, float]:
        """All that is remembered, as JSON."""
        return dataclasses.asdict(self)
