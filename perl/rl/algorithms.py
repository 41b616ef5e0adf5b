"""The algorithms, each a row of one table: how a rollout becomes advantages, and advantages a loss.

    name        advantage        surrogate   scaling
    reinforce   return           plain       whiten    Williams 1992, with a learned baseline
    ppo         gae              clip        whiten    Schulman et al. 2017
    rloo        leave_one_out    clip        none      Ahmadian et al. 2024

Departures from the PERL paper (arXiv 2403.10704), which uses REINFORCE with a learned baseline and a terminal
reward: the KL term is spread over the tokens it arises at, the baseline is the value of each token's state,
and advantages are whitened over the rollout. γ is 1, as in the paper.

The rewards that come in are normalised (`perl.rl.rewards.scale`), so returns and the critic's targets are of the
order of 1 whatever the user's reward is measured in, and the constants below mean the same everywhere.

Axis letters: B completions, T completion positions.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from perl.rl.maths import (
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
    """What a rollout knows of its completions before the policy learns from them; all fp32, the mask bool."""

    scores_B: Tensor
    """What the policy is to raise."""
    sampler_log_probs_BT: Tensor
    reference_log_probs_BT: Tensor
    values_BT: Tensor | None
    mask_BT: Tensor


class Targets(NamedTuple):
    """What the policy and the critic are to learn; fp32 (B, T)."""

    advantages_BT: Tensor
    returns_BT: Tensor | None
    """What the critic is to predict; None without a critic."""


@dataclass(frozen=True)
class Algorithm:
    """A row of the table, its constants resolved."""

    advantage: Literal["return", "gae", "leave_one_out"]
    """Return to go less the value; GAE; or the completion's return against its group's."""
    surrogate: Literal["plain", "clip"]
    """-A log π, or PPO's clipped surrogate."""
    scaling: Literal["whiten", "none"]
    """Whether advantages get mean 0 and variance 1 over the rollout. The mean of leave-one-out is its own baseline
    and is left alone, and so is its spread: a rollout with little signal makes a small step."""
    samples_per_prompt: int = 1
    """Completions of a prompt, side by side: a group."""
    gae_lambda: float = 1.0
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coef: float = 0.0
    """Share of the critic's gradient that reaches a trunk shared with the policy; its head gets all of it."""

    @property
    def needs_critic(self) -> bool:
        """Whether `estimate` reads values."""
        return self.advantage != "leave_one_out"

    def has_signal(self, scores_B: Tensor) -> bool:
        """Whether the scores tell completions apart: else all that a step could learn from is noise.

        Scores that differ by no more than rounding are equal; those that are not finite the update will refuse.
        """
        if not scores_B.isfinite().all():
            return True
        compared = scores_B.view(
            -1, self.samples_per_prompt if self.advantage == "leave_one_out" else len(scores_B)
        )
        spread = (compared.amax(1) - compared.amin(1)).max()
        return bool(spread > ROUNDING * (1.0 + scores_B.abs().max()))

    def estimate(self, scored: Scored, kl_coef: float) -> Targets:
        """Advantages of a whole rollout, and returns for the critic, of the objective `(1-β) r - β KL`."""
        mask_BT = scored.mask_BT
        rewards_BT = token_rewards(
            scored.scores_B, scored.sampler_log_probs_BT, scored.reference_log_probs_BT, mask_BT, kl_coef
        )
        returns_BT = None
        if self.advantage == "leave_one_out":
            advantages_B = leave_one_out(rewards_BT.sum(1), self.samples_per_prompt)
            advantages_BT = advantages_B[:, None] * mask_BT
        elif self.advantage == "gae":
            assert scored.values_BT is not None
            advantages_BT, returns_BT = gae(rewards_BT, scored.values_BT, mask_BT, 1.0, self.gae_lambda)
        else:
            assert scored.values_BT is not None
            returns_BT = returns_to_go(rewards_BT, mask_BT)
            advantages_BT = (returns_BT - scored.values_BT) * mask_BT
        if self.scaling == "whiten":
            advantages_BT = masked_whiten(advantages_BT, mask_BT)
        return Targets(advantages_BT, returns_BT)

    def policy_loss(
        self,
        log_probs_BT: Tensor,
        sampler_log_probs_BT: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        tokens: float,
    ) -> tuple[Tensor, Tensor | None]:
        """The policy's share of the loss of a micro-batch, in a minibatch of so many tokens.

        Returns:
            the loss, and the share of the minibatch's tokens whose gradient the clip took away (None: no clip).
        """
        if self.surrogate == "plain":
            return policy_gradient_loss(log_probs_BT, advantages_BT, mask_BT, tokens), None
        return ppo_policy_loss(log_probs_BT, sampler_log_probs_BT, advantages_BT, mask_BT, self.clip, tokens)

    def value_loss(
        self, values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, tokens: float
    ) -> Tensor:
        """The critic's share: half the squared error, clipped where the policy is."""
        clip = self.value_clip if self.surrogate == "clip" else None
        return value_loss(values_BT, old_values_BT, returns_BT, mask_BT, clip, tokens)


ROUNDING = 1e-6
"""Relative difference below which two fp32 scores are equal."""

ALGORITHMS: dict[str, Algorithm] = {
    "reinforce": Algorithm("return", "plain", "whiten"),
    "ppo": Algorithm("gae", "clip", "whiten"),
    "rloo": Algorithm("leave_one_out", "clip", "none"),
}
"""The rows, by the name that a recipe gives."""
