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

A recipe is checked against this table before torch is loaded: so the arithmetic is imported where it is used.

Axis letters: B completions, T completion positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from perl.rl.rollout import Rollout
    from perl.roles.roles import Outputs

ROUNDING = 1e-6
"""Relative difference below which two fp32 scores are equal."""


class Targets(NamedTuple):
    """What the policy and the critic are to learn; fp32 (B, T), 0 in the padding."""

    advantages_BT: Tensor
    returns_BT: Tensor | None
    """What the critic is to predict; None without a critic."""


@dataclass(frozen=True)
class Algorithm:
    """A row of the table. A subclass may override any method, and add fields."""

    advantage: Literal["return", "gae", "leave_one_out"]
    """Return to go less the value; GAE; or the completion's return against its group's."""
    surrogate: Literal["plain", "clip"]
    """-A log π, or PPO's clipped surrogate."""
    scaling: Literal["whiten", "none"]
    """Whether advantages get mean 0 and variance 1 over the rollout. The mean of leave-one-out is its own baseline
    and is left alone, and so is its spread: a rollout with little signal makes a small step."""
    samples_per_prompt: int = 1
    """Completions of a prompt where the recipe does not say; measured in docs/experiments.md, as `epochs` is."""
    epochs: int = 1
    """Updates from each rollout where the recipe does not say."""
    gae_lambda: float = 1.0
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coef: float = 0.0
    """Share of the critic's gradient that reaches a trunk shared with the policy; its head gets all of it."""

    @property
    def needs_critic(self) -> bool:
        """Whether `estimate` reads values."""
        return self.advantage != "leave_one_out"

    @property
    def compares_groups(self) -> bool:
        """Whether completions of one prompt are compared with one another: there must be two at least."""
        return self.advantage == "leave_one_out"

    @property
    def on_policy(self) -> bool:
        """Whether the loss is right only for the policy that sampled: one update a rollout."""
        return self.surrogate == "plain"

    def has_signal(self, rollout: Rollout, rewards_B: Tensor) -> bool:
        """Whether the rewards tell completions apart: else all that a step could learn from is noise.

        Rewards that differ by no more than rounding are equal; those that are not finite the update will refuse.
        """
        if not rewards_B.isfinite().all():
            return True
        compared = rewards_B.view(-1, rollout.group_size if self.compares_groups else len(rewards_B))
        spread = (compared.amax(1) - compared.amin(1)).max()
        return bool(spread > ROUNDING * (1.0 + rewards_B.abs().max()))

    def estimate(self, rollout: Rollout, rewards_B: Tensor, kl_coef: float) -> Targets:
        """Advantages of a whole rollout, and returns for the critic, of the objective `(1-β) r - β KL`.

        Args:
            rollout: of all processes.
            rewards_B: what the policy is to raise, fp32: normalised, less penalties.
            kl_coef: β.
        """
        from perl.rl import maths

        mask_BT, values_BT = rollout.completion_mask_BT, rollout.values_BT
        rewards_BT = maths.token_rewards(
            rewards_B, rollout.policy_log_probs_BT, rollout.reference_log_probs_BT, mask_BT, kl_coef
        )
        returns_BT = None
        if self.advantage == "leave_one_out":
            advantages_B = maths.leave_one_out(rewards_BT.sum(1), rollout.group_size)
            advantages_BT = advantages_B[:, None] * mask_BT
        elif self.advantage == "gae":
            assert values_BT is not None
            advantages_BT, returns_BT = maths.gae(rewards_BT, values_BT, mask_BT, 1.0, self.gae_lambda)
        else:
            assert values_BT is not None
            returns_BT = maths.returns_to_go(rewards_BT, mask_BT)
            advantages_BT = (returns_BT - values_BT) * mask_BT
        if self.scaling == "whiten":
            advantages_BT = maths.masked_whiten(advantages_BT, mask_BT)
        return Targets(advantages_BT, returns_BT)

    def policy_loss(
        self, outputs: Outputs, batch: Rollout, targets: Targets, tokens: float
    ) -> tuple[Tensor, Tensor | None]:
        """The policy's share of the loss of a micro-batch.

        Args:
            outputs: what the policy now says of these completions; gradients flow to it.
            batch: the completions.
            targets: of these completions.
            tokens: completion tokens of the whole minibatch, which losses are divided by.

        Returns:
            the loss, and the share of the minibatch's tokens whose gradient the clip took away (None: no clip).
        """
        from perl.rl import maths

        assert outputs.log_probs_BT is not None
        mask_BT = batch.completion_mask_BT
        if self.surrogate == "plain":
            return maths.policy_gradient_loss(outputs.log_probs_BT, targets.advantages_BT, mask_BT, tokens), None
        return maths.ppo_policy_loss(
            outputs.log_probs_BT, batch.policy_log_probs_BT, targets.advantages_BT, mask_BT, self.clip, tokens
        )

    def value_loss(self, outputs: Outputs, batch: Rollout, targets: Targets, tokens: float) -> Tensor:
        """The critic's share: half the squared error, clipped where the policy is. Arguments as `policy_loss`."""
        from perl.rl import maths

        assert outputs.values_BT is not None
        assert batch.values_BT is not None
        assert targets.returns_BT is not None
        clip = self.value_clip if self.surrogate == "clip" else None
        mask_BT = batch.completion_mask_BT
        return maths.value_loss(outputs.values_BT, batch.values_BT, targets.returns_BT, mask_BT, clip, tokens)


ALGORITHMS: dict[str, Algorithm] = {
    "reinforce": Algorithm("return", "plain", "whiten"),
    "ppo": Algorithm("gae", "clip", "whiten", epochs=2),
    "rloo": Algorithm("leave_one_out", "clip", "none", samples_per_prompt=4, epochs=2),
}
"""The rows, by the name that a recipe gives."""
