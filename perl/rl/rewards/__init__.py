"""Rewards of completions: the reward model, functions, custom kinds, and weighted sums of several."""

from perl.recipe.reward_parts import REWARDS, RewardPart
from perl.rl.rewards.base import RewardContext, RewardSource

__all__ = ["REWARDS", "RewardContext", "RewardPart", "RewardSource"]
