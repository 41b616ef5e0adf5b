"""The losses of the policy and its critic. Pure functions; axes and conventions as in `perl.rl.maths`.

A policy loss combines two switches. A surrogate gives each token a term to be minimised; an average reduces the
terms to one number. Averages divide by the sizes of the whole minibatch (`Sizes`), so the losses and gradients of
its micro-batches add up to those of the minibatch however the completions are divided among them.

References: Williams 1992 (REINFORCE); Schulman et al. 2017 (PPO, arXiv 1707.06347); Ye et al. 2020 (dual clip,
arXiv 1912.09729); Yu et al. 2025 (DAPO, arXiv 2503.14476); Zheng et al. 2025 (GSPO, arXiv 2507.18071); MiniMax
2025 (CISPO, arXiv 2506.13585); Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783); Kimi Team 2025 (k1.5, arXiv
2501.12599).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perl.rl.maths import masked


@dataclass(frozen=True)
class Tokens:
    """Inputs of a surrogate, each (B, T).

    Raises:
        AssertionError: the shapes differ.
    """

    log_probs_BT: Tensor
    """fp32, of the sampled tokens under the policy being trained; gradients flow to it."""
    policy_log_probs_BT: Tensor
    """fp32, under the policy before the rollout's first update, π_old."""
    advantages_BT: Tensor
    """fp32, detached."""
    mask_BT: Tensor
    """bool, True on the tokens that are trained on."""

    def __post_init__(self) -> None:
        shapes = {value.shape for value in vars(self).values()}
        assert len(shapes) == 1, f"tensors of several shapes: {shapes}"


class Constants(NamedTuple):
    """Constants of the surrogates."""

    low: float = 0.2
    """The ratio is clipped below at 1 - low."""
    high: float = 0.2
    """The ratio is clipped above at 1 + high."""
    dual: float = 0.0
    """For negative advantages, the ratio above which there is no gradient; 0: no such bound."""
    answer: bool = False
    """Whether the ratio is that of the whole completion."""
    tau: float = 1.0
    """Weight of the squared log-ratio in `mirror`."""


class Sizes(NamedTuple):
    """Sizes of the minibatch, over all processes."""

    tokens: float
    """Number of completion tokens that are trained on, N."""
    completions: float
    """Number of completions that are trained on, B."""
    longest: int
    """Maximum number of tokens of a completion, L_max."""


class Terms(NamedTuple):
    """Result of a surrogate."""

    loss_BT: Tensor
    """fp32, 0 outside the mask."""
    clipped_BT: Tensor | None
    """bool, True on the tokens whose gradient was clipped away; None: the surrogate has no clip."""


def _ratio(tokens: Tokens, answer: bool) -> Tensor:
    """Return ρ_t = π(a_t) / π_old(a_t), or GSPO's ratio of the whole completion; 1 outside the mask.

        s = exp(1/|y| Σ_t log ρ_t)        s_t = sg[s] · π(a_t) / sg[π(a_t)]

    All s_t equal s, but each has the gradient of its own token.
    """
    log_ratio_BT = masked(tokens.log_probs_BT - tokens.policy_log_probs_BT, tokens.mask_BT)
    if answer:
        known_BT = masked(tokens.log_probs_BT, tokens.mask_BT)
        mean_B1 = log_ratio_BT.sum(1, keepdim=True) / tokens.mask_BT.sum(1, keepdim=True).clamp(min=1)
        log_ratio_BT = masked(mean_B1.detach() + known_BT - known_BT.detach(), tokens.mask_BT)
    return log_ratio_BT.exp()


def plain(tokens: Tokens, constants: Constants) -> Terms:
    """-A_t log π(a_t), whose gradient is REINFORCE's (Williams 1992)."""
    known_BT, advantages_BT = (
        masked(tokens.log_probs_BT, tokens.mask_BT),
        masked(tokens.advantages_BT, tokens.mask_BT),
    )
    return Terms(-(advantages_BT * known_BT), None)


def ratio(tokens: Tokens, constants: Constants) -> Terms:
    """-ρ A, importance-weighted and not clipped (Schulman et al. 2015, eq. 14)."""
    return Terms(-_ratio(tokens, constants.answer) * masked(tokens.advantages_BT, tokens.mask_BT), None)


def clip(tokens: Tokens, constants: Constants) -> Terms:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated; the bounds may differ (DAPO, eq. 10).

    -min(ρ A, clamp(ρ, 1 - low, 1 + high) A), and with a dual clip c at A < 0 at most -c A (Ye et al., eq. 5)
    """
    ratio_BT = _ratio(tokens, constants.answer)
    advantages_BT = masked(tokens.advantages_BT, tokens.mask_BT)
    plain_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1.0 - constants.low, 1.0 + constants.high) * advantages_BT
    gain_BT, took_BT = torch.minimum(plain_BT, clipped_BT), clipped_BT < plain_BT
    if constants.dual:
        worst_BT = constants.dual * advantages_BT.clamp(max=0.0)
        beyond_BT = (advantages_BT < 0) & (gain_BT < worst_BT)
        gain_BT, took_BT = torch.where(beyond_BT, worst_BT, gain_BT), took_BT | beyond_BT
    return Terms(-gain_BT, took_BT)


def clip_weight(tokens: Tokens, constants: Constants) -> Terms:
    """CISPO (MiniMax 2025): the weight is clipped instead of the update, so each token keeps its gradient.

    -sg[clamp(ρ, 1 - low, 1 + high)] A log π(a_t)
    """
    weight_BT = _ratio(tokens, constants.answer).detach().clamp(1.0 - constants.low, 1.0 + constants.high)
    known_BT, advantages_BT = (
        masked(tokens.log_probs_BT, tokens.mask_BT),
        masked(tokens.advantages_BT, tokens.mask_BT),
    )
    return Terms(-(weight_BT * advantages_BT * known_BT), None)


def mirror(tokens: Tokens, constants: Constants) -> Terms:
    """Online mirror descent (Kimi k1.5, eq. 3), with the policy that sampled the rollout as its reference.

        l(y) = -Σ_t A_t log π(a_t) + τ/2 (log π(y) - log π_old(y))²

    Each token of a completion carries the whole completion's l(y), so that their mean is l(y).
    """
    log_ratio_BT = masked(tokens.log_probs_BT - tokens.policy_log_probs_BT, tokens.mask_BT)
    gain_B = -plain(tokens, constants).loss_BT.sum(1)
    loss_B = 0.5 * constants.tau * log_ratio_BT.sum(1).square() - gain_B
    return Terms(masked(loss_B[:, None].expand_as(tokens.mask_BT), tokens.mask_BT), None)


def mean_of_tokens(terms_BT: Tensor, mask_BT: Tensor, sizes: Sizes) -> Tensor:
    """Σ_i Σ_t l_it / N: all tokens have equal weight."""
    return terms_BT.sum() / sizes.tokens


def mean_of_answers(terms_BT: Tensor, mask_BT: Tensor, sizes: Sizes) -> Tensor:
    """1/B Σ_i 1/|y_i| Σ_t l_it: all completions have equal weight."""
    return (terms_BT.sum(1) / mask_BT.sum(1).clamp(min=1)).sum() / sizes.completions


def over_a_constant(terms_BT: Tensor, mask_BT: Tensor, sizes: Sizes) -> Tensor:
    """Σ_i Σ_t l_it / (B L_max): a token's weight does not depend on the rollout's lengths (Dr. GRPO)."""
    return terms_BT.sum() / (sizes.completions * sizes.longest)


Surrogate = Callable[[Tokens, Constants], Terms]
SURROGATES: Mapping[str, Surrogate] = {
    "plain": plain,
    "ratio": ratio,
    "clip": clip,
    "clip-weight": clip_weight,
    "mirror": mirror,
}
"""Surrogates by the names in `perl.rl.algorithm`."""
Average = Callable[[Tensor, Tensor, Sizes], Tensor]
AVERAGES: Mapping[str, Average] = {
    "tokens": mean_of_tokens,
    "answers": mean_of_answers,
    "constant": over_a_constant,
}


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip: float | None,
    normalizer: float,
) -> Tensor:
    """Return half the critic's squared error, clipped as in PPO's published code (openai/baselines, ppo2).

        loss = ½ Σ max((V - R)², (V_old + clamp(V - V_old, -c, c) - R)²) / normalizer

    Args:
        values_BT: fp32, of the critic being trained.
        old_values_BT: fp32, the values from which the advantages were estimated.
        returns_BT: fp32, detached.
        mask_BT: bool.
        clip: c; None for the plain squared error.
        normalizer: completion tokens in the whole minibatch.

    Returns:
        fp32 scalar.
    """
    known_values_BT, targets_BT = masked(values_BT, mask_BT), masked(returns_BT, mask_BT)
    squared_BT = (known_values_BT - targets_BT).square()
    if clip is not None:
        starts_BT = masked(old_values_BT, mask_BT)
        near_BT = starts_BT + (known_values_BT - starts_BT).clamp(-clip, clip)
        squared_BT = torch.maximum(squared_BT, (near_BT - targets_BT).square())
    return 0.5 * squared_BT.sum() / normalizer
