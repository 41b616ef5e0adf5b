"""An algorithm: how a rollout becomes advantages and advantages a loss, in five switches and some constants.

`perl.rl.algorithms` is the table of algorithms. A subclass may override any method and add fields.

Recipes are checked against this module before torch is loaded, so functions import the arithmetic themselves.

Axis letters: B completions, T completion positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from perl.rl.losses import Sizes
    from perl.rl.rollout import Rollout
    from perl.roles.outputs import Outputs

ROUNDING = 1e-6
"""Relative difference up to which two fp32 scores count as equal."""

Advantage = Literal["return", "gae", "group", "group-std", "leave-one-out", "group-relative"]
Surrogate = Literal["plain", "ratio", "clip", "clip-weight", "mirror"]
Ratio = Literal["token", "answer"]
Average = Literal["tokens", "answers", "constant"]
Kl = Literal["reward-k1", "loss-k2", "loss-k3", "none"]
Direction = Literal["adam", "natural"]
PromptSampling = Literal["uniform", "prioritised", "curriculum"]
SWITCHES = ("advantage", "surrogate", "ratio", "average", "kl")


class Targets(NamedTuple):
    """Targets of the policy and the critic; fp32 (B, T), 0 in the padding."""

    advantages_BT: Tensor
    returns_BT: Tensor | None
    """Targets of the critic; None without a critic."""
    learned_BT: Tensor | None = None
    """bool, True on the tokens that are trained on; None: all completion tokens."""
    kl_coef: float = 0.0
    """Weight of the KL in the loss."""

    def mask(self, rollout: Rollout) -> Tensor:
        """Return a bool mask (B, T) of the completion tokens that are trained on."""
        return rollout.completion_mask_BT if self.learned_BT is None else self.learned_BT

    def take(self, rows: list[int] | slice, length: int) -> Targets:
        """Return the targets of these rows, cut to `length` columns."""
        from perl.system.device import to_device

        device = self.advantages_BT.device
        rows_B = rows if isinstance(rows, slice) else to_device(rows, device)

        def of(value_BT: Tensor | None) -> Tensor | None:
            return None if value_BT is None else value_BT[rows_B, :length]

        return self._replace(
            advantages_BT=self.advantages_BT[rows_B, :length],
            returns_BT=of(self.returns_BT),
            learned_BT=of(self.learned_BT),
        )


@dataclass(frozen=True)
class Algorithm:
    """A row of the table. A subclass may override any method and add fields."""

    advantage: Advantage
    """Return-to-go, minus the value if there is a critic; GAE; or the completion's return r relative to its group:
    r - r̄, (r - r̄) / σ, r minus the others' mean, or (r - r̄) / r̄."""
    surrogate: Surrogate
    """-A log π; -ρ A; PPO's clipped -ρ A; CISPO's clipped weight; Kimi's mirror descent."""
    ratio: Ratio = "token"
    """Whether the ratio to the policy before the update is computed per token or per completion."""
    average: Average = "tokens"
    """What has equal weight in the loss: tokens; completions; or tokens, with a constant divisor (the largest
    possible number of tokens)."""
    kl: Kl = "reward-k1"
    """Where β KL(π‖reference) is applied: in the reward of each token, in the loss as the estimate k2 or k3, or
    nowhere. In the reward, the objective is (1-β) r - β KL; in the loss, the reward keeps weight 1."""
    whiten: bool = False
    """Whether advantages are normalised to mean 0 and variance 1 over the rollout. Group algorithms need no such
    centring, and leave the variance alone so that a rollout with little signal makes a small step."""
    value_baseline: bool = True
    """Whether `advantage: return` uses a critic as its baseline."""
    normalize_rewards: bool = True
    """Whether rewards are normalised over the run so far (`perl.rl.rewards.scale`) or used as they are."""
    drop_equal_groups: bool = False
    """Whether groups whose rewards are all equal are left out of the averages."""
    redraws: int = 0
    """How often, at most, a step samples other prompts to replace those whose groups are left out."""
    reset_optimizer: bool = False
    """Whether the optimizer's moments are reset before each rollout: each rollout is a separate problem, whose
    reference is the policy that sampled it (Kimi k1.5, section 2.3.2)."""
    samples_per_prompt: int = 1
    """Default number of completions per prompt; like `epochs`, measured in docs/experiments.md for the first three
    rows."""
    epochs: int = 1
    """Default number of passes over each rollout."""
    gae_lambda: float = 1.0
    clip: float = 0.2
    """The ratio is clipped below at 1 - clip; 1: there is no lower bound."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + clip_high; None: the same as `clip`."""
    dual_clip: float = 0.0
    """For negative advantages, the ratio above which there is no gradient; 0: no such bound."""
    tau: float = 1.0
    """Temperature of `mirror`: at 1, an advantage of 1 raises a completion's optimal log-prob by one nat."""
    value_clip: float = 0.2
    """How far a value may move from its old value; 0: any distance."""
    value_coef: float = 0.0
    """Share of the critic's gradient that reaches a trunk shared with the policy; its head gets all of it."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, the entropy's mean over tokens."""
    direction: Direction = "adam"
    """How the policy's step is taken: by the optimizer, or along the natural gradient as far as `trust_region`
    allows, without a learning rate. The critic's step is always the optimizer's."""
    trust_region: float | None = None
    """δ, in nats per token: a step that moves the policy by a larger mean KL is shortened; None: no limit."""
    rate_factor: float = 1.0
    """Factor of `learning_rate: auto`."""

    @property
    def compares_groups(self) -> bool:
        """Whether completions of one prompt are compared with one another, which takes at least two."""
        return self.advantage not in ("return", "gae")

    @property
    def needs_critic(self) -> bool:
        """Whether `estimate` reads values."""
        return self.advantage == "gae" or (self.advantage == "return" and self.value_baseline)

    @property
    def clips_ratio(self) -> bool:
        """Whether the surrogate holds the ratio within bounds."""
        return self.surrogate in ("clip", "clip-weight")

    @property
    def on_policy(self) -> bool:
        """Whether the loss is valid only for the policy that sampled, so that a rollout allows only one update."""
        return self.surrogate == "plain"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL is a term of the loss."""
        return self.kl in ("loss-k2", "loss-k3")

    def in_use(self) -> dict[str, str | float | bool]:
        """Return the switches and the constants that are in use, by recipe key."""
        clips = self.clips_ratio
        used = {
            "clip": clips,
            "clip_high": clips and self.clip_high is not None,
            "dual_clip": self.surrogate == "clip" and self.dual_clip > 0,
            "tau": self.surrogate == "mirror",
            "gae_lambda": self.advantage == "gae",
            "value_clip": self.needs_critic and self.surrogate == "clip",
            "value_coef": self.needs_critic and self.value_coef > 0,
            "whiten": self.whiten,
            "normalize_rewards": not self.normalize_rewards,
            "drop_equal_groups": self.drop_equal_groups,
            "redraws": self.redraws > 0,
            "reset_optimizer": self.reset_optimizer,
            "entropy_coef": self.entropy_coef > 0,
            "direction": self.direction != "adam",
            "trust_region": self.trust_region is not None,
        }
        return {key: getattr(self, key) for key in (*SWITCHES, *(key for key, is_used in used.items() if is_used))}

    @property
    def words(self) -> str:
        """The switches and constants in use, as readable text."""
        return ", ".join(f"{key} {str(value).lower()}" for key, value in self.in_use().items())

    def has_signal(self, rollout: Rollout, rewards_B: Tensor) -> bool:
        """Return whether the rewards distinguish completions; otherwise the step could learn only from noise.

        Rewards that differ by no more than rounding are equal. Non-finite ones count as signal; the update refuses
        them.
        """
        from perl.rl import maths

        if not rewards_B.isfinite().all():
            return True
        size = rollout.group_size if self.compares_groups else len(rewards_B)
        differ_B = ~maths.equal_groups(rewards_B, size, ROUNDING)
        if self.compares_groups:
            differ_B &= maths.GROUP_ADVANTAGES[self.advantage](rewards_B, size) != 0
        return bool(differ_B.any())

    def estimate(self, rollout: Rollout, rewards_B: Tensor, kl_coef: float) -> Targets:
        """Return the advantages of a whole rollout, and the returns for the critic.

        Args:
            rollout: the rollout of all processes.
            rewards_B: the rewards to maximise, fp32: normalised, minus penalties.
            kl_coef: β.
        """
        from perl.rl import maths

        mask_BT, size, in_reward = rollout.completion_mask_BT, rollout.group_size, self.kl == "reward-k1"
        rewards_BT = maths.token_rewards(
            rewards_B,
            rollout.policy_log_probs_BT,
            rollout.reference_log_probs_BT,
            mask_BT,
            kl_coef if in_reward else 0.0,
        )
        advantages_BT, returns_BT = self._advantages(rewards_BT, rollout)
        if self.whiten:
            advantages_BT = maths.masked_whiten(advantages_BT, mask_BT)
        learned_BT = None
        if self.compares_groups:
            # A KL in the reward distinguishes completions of equal rewards; without it, rounding must not.
            equal_B = maths.equal_groups(rewards_BT.sum(1), size, 0.0 if in_reward else ROUNDING)
            advantages_BT = advantages_BT.masked_fill(equal_B[:, None], 0.0)
        if self.drop_equal_groups:
            learned_BT = mask_BT & ~maths.equal_groups(rewards_B, size, ROUNDING)[:, None]
        return Targets(advantages_BT, returns_BT, learned_BT, kl_coef if self.kl_in_loss else 0.0)

    def _advantages(self, rewards_BT: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Return the advantages by the switch `advantage`, and the returns if there is a critic."""
        from perl.rl import maths

        mask_BT, values_BT = rollout.completion_mask_BT, rollout.values_BT
        if self.compares_groups:
            advantages_B = maths.GROUP_ADVANTAGES[self.advantage](rewards_BT.sum(1), rollout.group_size)
            return advantages_B[:, None] * mask_BT, None
        if not self.needs_critic:
            return maths.returns_to_go(rewards_BT, mask_BT), None
        assert values_BT is not None
        if self.advantage == "gae":
            return maths.gae(rewards_BT, values_BT, mask_BT, self.gae_lambda)
        returns_BT = maths.returns_to_go(rewards_BT, mask_BT)
        return (returns_BT - values_BT) * mask_BT, returns_BT

    def policy_loss(
        self, outputs: Outputs, batch: Rollout, targets: Targets, sizes: Sizes
    ) -> tuple[Tensor, Tensor | None]:
        """Return a micro-batch's share of the policy loss.

        Args:
            outputs: the current policy's outputs for these completions; gradients flow to it.
            batch: the completions.
            targets: the targets of these completions.
            sizes: the sizes of the whole minibatch.

        Returns:
            the loss, and the share of the minibatch's tokens whose gradient was clipped away (None: no clip).
        """
        from perl.rl import losses, maths

        log_probs_BT, mask_BT = outputs.log_probs_BT, targets.mask(batch)
        assert log_probs_BT is not None
        tokens = losses.Tokens(log_probs_BT, batch.policy_log_probs_BT, targets.advantages_BT, mask_BT)
        high = self.clip if self.clip_high is None else self.clip_high
        constants = losses.Constants(self.clip, high, self.dual_clip, self.ratio == "answer", self.tau)
        terms_BT, clipped_BT = losses.SURROGATES[self.surrogate](tokens, constants)
        if self.kl_in_loss:
            known_BT, reference_BT = (
                maths.masked(x, mask_BT) for x in (log_probs_BT, batch.reference_log_probs_BT)
            )
            terms_BT = terms_BT + targets.kl_coef * maths.KL_LOSSES[self.kl](known_BT, reference_BT)
        loss = losses.AVERAGES[self.average](terms_BT, mask_BT, sizes)
        if self.entropy_coef:
            assert outputs.entropy_BT is not None
            loss = loss - self.entropy_coef * maths.masked(outputs.entropy_BT, mask_BT).sum() / sizes.tokens
        return loss, None if clipped_BT is None else clipped_BT.float().sum() / sizes.tokens

    def value_loss(self, outputs: Outputs, batch: Rollout, targets: Targets, sizes: Sizes) -> Tensor:
        """Return a micro-batch's share of the critic's loss, half the squared error, clipped as the policy is.

        Args:
            outputs, batch, targets, sizes: as in `policy_loss`.
        """
        from perl.rl import losses

        assert outputs.values_BT is not None
        assert batch.values_BT is not None
        assert targets.returns_BT is not None
        clip = (self.value_clip or None) if self.surrogate == "clip" else None
        mask_BT = targets.mask(batch)
        return losses.value_loss(
            outputs.values_BT, batch.values_BT, targets.returns_BT, mask_BT, clip, sizes.tokens
        )
