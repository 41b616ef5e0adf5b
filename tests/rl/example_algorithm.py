"""An algorithm of one's own, as a plugin: `plugins: [example_algorithm.py]`, `rl: {algorithm: group-baseline}`.

A completion's advantage is its return minus its group's mean, and advantages are scaled to unit spread over
the whole rollout, so that groups in which little is at stake teach little.
"""

from dataclasses import dataclass

from torch import Tensor

from perl.rl.algorithm import Algorithm, Targets
from perl.rl.algorithms import ALGORITHMS
from perl.rl.maths import masked_whiten, token_rewards
from perl.rl.rollout import Rollout


@dataclass(frozen=True)
class GroupMeanBaseline(Algorithm):
    """The group's mean instead of a critic; the loss is PPO's, from the row below."""

    def estimate(self, rollout: Rollout, rewards_B: Tensor, kl_coef: float) -> Targets:
        """Advantages (B, T), the same for each token of a completion; there is no critic to teach."""
        mask_BT = rollout.completion_mask_BT
        rewards_BT = token_rewards(
            rewards_B, rollout.policy_log_probs_BT, rollout.reference_log_probs_BT, mask_BT, kl_coef
        )
        groups = rewards_BT.sum(1).view(-1, rollout.group_size)
        advantages_B = (groups - groups.mean(1, keepdim=True)).flatten()
        return Targets(masked_whiten(advantages_B[:, None] * mask_BT, mask_BT), None)


ALGORITHMS["group-baseline"] = GroupMeanBaseline(
    advantage="group", surrogate="clip", whiten=True, samples_per_prompt=4, epochs=2
)
