"""What the policy is to raise, besides the rewards themselves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """What the policy is to raise."""

    normalize_rewards: bool
    missing_end_penalty: float
    """In standard deviations of the reward, as the next two."""
    overlong_penalty: float = 0.0
    length_reward: float = 0.0
    length_reward_from: int = 0
    """The step, counted from 0, from which there is a length reward."""
    overlong_buffer: int = 1
    """Tokens before the longest completion's end in which the penalty rises."""
    success_reward: float = 0.5
    """Raw rewards from which a completion is right."""
    kl_target: float | None = None
    """Nats a completion that β is moved to keep; None: β is constant."""
    correct_sampler: bool = True
    """Whether advantages are weighed by the policy's probability over the sampler's."""
