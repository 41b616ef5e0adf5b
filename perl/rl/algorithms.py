"""The algorithms: each is an advantage estimator, a loss, and whether it needs a critic.

Departures from the PERL paper (arXiv 2403.10704), which uses REINFORCE with a learned baseline and a terminal
reward: the KL term is spread over the tokens it arises at, the baseline is the value of each token's state,
and advantages are whitened over the rollout. γ is 1, as in the paper.

Axis letters: B answers, T answer positions.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from perl.rl.arithmetic import (
    gae,
    leave_one_out,
    masked_whiten,
    policy_gradient_loss,
    ppo_policy_loss,
    returns_to_go,
    token_rewards,
    value_loss,
)


class Scored(NamedTuple):
    """What a rollout knows of its answers before the policy learns from them; all fp32, the mask bool."""

    scores_B: Tensor
    sampler_log_probs_BT: Tensor
    reference_log_probs_BT: Tensor
    values_BT: Tensor | None
    mask_BT: Tensor


class Targets(NamedTuple):
    """What the policy and the critic are to learn; fp32 (B, T)."""

    advantages_BT: Tensor
    returns_BT: Tensor | None
    """What the critic is to predict; None without a critic."""


class Algorithm(Protocol):
    """How a rollout becomes a loss."""

    @property
    def needs_critic(self) -> bool:
        """Whether `estimate` reads values."""

    def estimate(self, scored: Scored, kl_coef: float) -> Targets:
        """Advantages, and returns for the critic, of a whole rollout."""

    def policy_loss(
        self,
        log_probs_BT: Tensor,
        sampler_log_probs_BT: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        tokens: float,
    ) -> Tensor:
        """The policy's share of the loss of a micro-batch, in a minibatch of so many tokens."""

    def value_loss(
        self, values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, tokens: float
    ) -> Tensor:
        """The critic's share."""


@dataclass(frozen=True)
class Reinforce:
    """REINFORCE with a learned baseline (Williams 1992): advantage = return to go - value."""

    needs_critic: bool = True

    def estimate(self, scored: Scored, kl_coef: float) -> Targets:
        """Returns to go of the objective `(1-β) r - β KL`, less their values."""
        assert scored.values_BT is not None
        returns_BT = returns_to_go(_rewards(scored, kl_coef), scored.mask_BT)
        return Targets(masked_whiten(returns_BT - scored.values_BT, scored.mask_BT), returns_BT)

    def policy_loss(
        self,
        log_probs_BT: Tensor,
        sampler_log_probs_BT: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        tokens: float,
    ) -> Tensor:
        """-A log π."""
        return policy_gradient_loss(log_probs_BT, advantages_BT, mask_BT, tokens)

    def value_loss(
        self, values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, tokens: float
    ) -> Tensor:
        """Half the squared error."""
        return value_loss(values_BT, old_values_BT, returns_BT, mask_BT, None, tokens)


@dataclass(frozen=True)
class Ppo:
    """PPO (Schulman et al. 2017): GAE, clipped surrogate, clipped value loss."""

    needs_critic: bool = True
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2

    def estimate(self, scored: Scored, kl_coef: float) -> Targets:
        """Generalized advantage estimates with γ = 1."""
        assert scored.values_BT is not None
        rewards_BT = _rewards(scored, kl_coef)
        advantages_BT, returns_BT = gae(rewards_BT, scored.values_BT, scored.mask_BT, 1.0, self.lam)
        return Targets(masked_whiten(advantages_BT, scored.mask_BT), returns_BT)

    def policy_loss(
        self,
        log_probs_BT: Tensor,
        sampler_log_probs_BT: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        tokens: float,
    ) -> Tensor:
        """-min(ρ A, clamp(ρ) A)."""
        return ppo_policy_loss(log_probs_BT, sampler_log_probs_BT, advantages_BT, mask_BT, self.clip, tokens)[0]

    def value_loss(
        self, values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, tokens: float
    ) -> Tensor:
        """Half the squared error, the larger of the plain and the clipped one."""
        return value_loss(values_BT, old_values_BT, returns_BT, mask_BT, self.value_clip, tokens)


@dataclass(frozen=True)
class Rloo:
    """REINFORCE leave-one-out (Ahmadian et al. 2024): each answer against the others to its prompt."""

    samples_per_prompt: int
    needs_critic: bool = False
    clip: float = 0.2

    def estimate(self, scored: Scored, kl_coef: float) -> Targets:
        """The whole answer's objective against its group, the same for all its tokens."""
        objective_B = _rewards(scored, kl_coef).sum(1)
        advantages_B = leave_one_out(objective_B, self.samples_per_prompt)
        advantages_BT = advantages_B[:, None].expand_as(scored.mask_BT)
        return Targets(masked_whiten(advantages_BT, scored.mask_BT), None)

    def policy_loss(
        self,
        log_probs_BT: Tensor,
        sampler_log_probs_BT: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        tokens: float,
    ) -> Tensor:
        """PPO's clipped surrogate: in a first epoch its gradient is that of -A log π."""
        return ppo_policy_loss(log_probs_BT, sampler_log_probs_BT, advantages_BT, mask_BT, self.clip, tokens)[0]

    def value_loss(
        self, values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, tokens: float
    ) -> Tensor:
        """There is no critic."""
        raise AssertionError("RLOO has no critic")


def _rewards(scored: Scored, kl_coef: float) -> Tensor:
    return token_rewards(
        scored.scores_B, scored.sampler_log_probs_BT, scored.reference_log_probs_BT, scored.mask_BT, kl_coef
    )


def algorithm(name: str, samples_per_prompt: int) -> Algorithm:
    """The algorithm of a recipe's `rl.algorithm`."""
    if name == "rloo":
        return Rloo(samples_per_prompt)
    return Ppo() if name == "ppo" else Reinforce()
