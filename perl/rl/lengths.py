"""What the length of a completion adds to its reward, in the unit that the reward is weighed in. Pure functions.

References: Kimi Team 2025 (k1.5, arXiv 2501.12599, section 2.3.3); Yu et al. 2025 (DAPO, arXiv 2503.14476).
Axis letter: B completions; those of one prompt stand side by side.
"""

import torch
from torch import Tensor


def length_reward(lengths_B: Tensor, right_B: Tensor, group_size: int) -> Tensor:
    """Kimi's: short right completions gain, long ones lose, and wrong ones never gain.

        λ_i = 0.5 - (len_i - min) / (max - min)        right: λ_i        wrong: min(0, λ_i)

    Minimum and maximum are of the group; where they are equal all get 0.

    Args:
        lengths_B: tokens.
        right_B: bool, the completions that are right.
        group_size: completions of one prompt.

    Returns:
        fp32 (B), from -0.5 to 0.5.
    """
    groups = lengths_B.float().view(-1, group_size)
    shortest, longest = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    spread = longest - shortest
    gain_B = torch.where(spread > 0, 0.5 - (groups - shortest) / spread.clamp(min=1.0), 0.0).flatten()
    return torch.where(right_B, gain_B, gain_B.clamp(max=0.0))


def overlong_penalty(lengths_B: Tensor, longest: int, buffer: int) -> Tensor:
    """DAPO's soft punishment: 0 up to L_max - L_buffer tokens, from there linearly to -1 at L_max.

    Args:
        lengths_B: tokens.
        longest: L_max, the most that there can be.
        buffer: L_buffer, at least 1.

    Returns:
        fp32 (B), from -1 to 0.
    """
    return ((longest - buffer - lengths_B.float()) / buffer).clamp(-1.0, 0.0)
