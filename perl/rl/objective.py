"""The objective of the policy: normalised rewards with bonuses and penalties for length.

References for lengths: Kimi Team 2025 (k1.5, arXiv 2501.12599, section 2.3.3); Yu et al. 2025 (DAPO, arXiv
2503.14476).

Axis letters: B completions, those of one prompt adjacent; T completion positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from perl.rl.rewards.scale import ABSURD, FARTHEST, RewardScale
from perl.rl.rollout import Rollout
from perl.system.progress import console


@dataclass(frozen=True)
class Objective:
    """The quantity that the policy maximises."""

    normalize_rewards: bool
    missing_end_penalty: float
    """In standard deviations of the reward, like the next two."""
    overlong_penalty: float = 0.0
    length_reward: float = 0.0
    length_reward_from: int = 0
    """The first step, counted from 0, with a length reward."""
    overlong_buffer: int = 1
    """Number of tokens before the maximum length over which the penalty rises."""
    success_reward: float = 0.5
    """Raw reward from which a completion counts as correct."""
    kl_target: float | None = None
    """KL in nats per completion that adapting β aims at; None: β is constant."""
    correct_sampler: bool = True
    """Whether advantages are weighted by the ratio of the policy's probability to the sampler's."""

    def normalized(self, step: int, rollout: Rollout, scale: RewardScale) -> Tensor:
        """Return the rewards that are trained on, fp32 (B), with Kimi's length reward from its first step on.

        Args:
            scale: scale of all rewards so far; it is updated with these.
        """
        # On the host, which reads the values, so that it waits for the device only once.
        normalized_B = self._normalize(step, rollout.rewards_B.cpu(), scale).to(
            rollout.rewards_B.device, non_blocking=True
        )
        if not self.length_reward or step < self.length_reward_from:
            return normalized_B
        right_B = rollout.rewards_B >= self.success_reward
        gain_B = length_reward(rollout.completion_mask_BT.sum(1), right_B, rollout.group_size)
        return normalized_B + self.length_reward * self._unit(scale) * gain_B

    def penalized(self, rollout: Rollout, normalized_B: Tensor, scale: RewardScale) -> Tensor:
        """Return the normalised rewards minus the penalties for missing end and length, fp32 (B)."""
        unit, mask_BT = self._unit(scale), rollout.completion_mask_BT
        rewards_B = normalized_B - self.missing_end_penalty * unit * ~rollout.ended_B
        if self.overlong_penalty:
            over_B = overlong_penalty(mask_BT.sum(1), rollout.completion_length, self.overlong_buffer)
            rewards_B = rewards_B + self.overlong_penalty * unit * over_B
        return rewards_B

    def _normalize(self, step: int, rewards_B: Tensor, scale: RewardScale) -> Tensor:
        """Return rewards in standard deviations of all rewards so far, or unchanged."""
        if not self.normalize_rewards:
            scale.update(rewards_B)
            return rewards_B.float()
        within_B = scale.within(rewards_B)
        if (absurd := scale.absurd(rewards_B)) is not None:
            console.print(
                f"[yellow]Step {step + 1}[/]: a reward of {absurd:.3g} lies more than {ABSURD:g} standard "
                f"deviations from the mean of the earlier ones, {scale.mean:.3g}; it is clipped to {FARTHEST:g}."
            )
        scale.update(within_B)
        return scale.normalized(within_B)

    def _unit(self, scale: RewardScale) -> float:
        """Return a standard deviation of the reward in the unit of training; 0 while all rewards are equal."""
        return float(scale.std > 0.0) if self.normalize_rewards else scale.std


# Length terms, in standard deviations of the reward: pure functions.


def length_reward(lengths_B: Tensor, right_B: Tensor, group_size: int) -> Tensor:
    """Return Kimi's length reward: short correct completions gain, long ones lose, wrong ones never gain.

        λ_i = 0.5 - (len_i - min) / (max - min)        correct: λ_i        wrong: min(0, λ_i)

    Minimum and maximum are those of the group; if they are equal, all get 0.

    Args:
        lengths_B: tokens.
        right_B: bool, True for correct completions.
        group_size: completions per prompt.

    Returns:
        fp32 (B), from -0.5 to 0.5.
    """
    groups = lengths_B.float().view(-1, group_size)
    shortest, longest = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    spread = longest - shortest
    gain_B = torch.where(spread > 0, 0.5 - (groups - shortest) / spread.clamp(min=1.0), 0.0).flatten()
    return torch.where(right_B, gain_B, gain_B.clamp(max=0.0))


def overlong_penalty(lengths_B: Tensor, longest: int, buffer: int) -> Tensor:
    """Return DAPO's soft overlong punishment: 0 up to L_max - L_buffer tokens, then linear to -1 at L_max.

    Args:
        lengths_B: tokens.
        longest: L_max, the maximum length.
        buffer: L_buffer, at least 1.

    Returns:
        fp32 (B), from -1 to 0.
    """
    return ((longest - buffer - lengths_B.float()) / buffer).clamp(-1.0, 0.0)
