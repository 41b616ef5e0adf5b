"""What scores completions: the reward model, functions, kinds of one's own, and the weighted sum of several."""

from perl.recipe.reward_parts import REWARDS, RewardPart
from perl.rl.rewards.base import RewardContext, RewardSource

__all__ = ["REWARDS", "RewardContext", "RewardPart", "RewardSource"]
