"""The arithmetic of RL on completions: rewards of tokens, advantages, losses. Pure functions of tensors.

Axes: B completions, T positions in them. Every tensor is fp32 unless said otherwise; every mask is bool, True on
the completion's tokens. Completions are right-padded. Whatever stands in the padding, NaN and infinity included,
reaches neither a result nor a gradient, and results are 0 there (the per-token KL estimates, which take no mask,
apart).

Losses are sums over tokens divided by `normalizer`, the number of completion tokens of the whole minibatch, so
that the gradients of its micro-batches add up to its own however the tokens fall among them.

References: Schulman et al. 2016 (GAE, arXiv 1506.02438); Schulman et al. 2017 (PPO, arXiv 1707.06347);
Schulman 2020 (joschu.net/blog/kl-approx.html); Kool et al. 2019 and Ahmadian et al. 2024 (RLOO,
arXiv 2402.14740); PERL (arXiv 2403.10704).

Departures from PERL: none in the objective; the KL term is spread over the tokens by its k1 estimate, so that
the critic and the discounting see it where it arises.
"""

import torch
from torch import Tensor


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask`, else 0. Applied before any arithmetic, since 0 × NaN in a gradient is NaN."""
    return x.masked_fill(~mask, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked entries, Σ m x / Σ m; 0 if there are none.

    Args:
        x: fp32, any shape.
        mask: bool, the shape of `x`.

    Returns:
        fp32 scalar.
    """
    return masked(x, mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the masked entries to unit variance, (x - μ) / √(σ² + eps), with μ and σ² over masked entries.

    σ² is the population's (divided by n). One entry, or entries all alike, become 0 and not NaN. The form is
    that of `whiten` in openai/lm-human-preferences (Ziegler et al. 2019, arXiv 1909.08593).

    Args:
        x_BT: fp32.
        mask_BT: bool.
        shift_mean: whether the mean becomes 0; if not, μ is added back, so only the spread changes.
        eps: added to the variance.

    Returns:
        fp32 (B, T); 0 outside the mask.
    """
    mean = masked_mean(x_BT, mask_BT)
    centred_BT = masked(x_BT - mean, mask_BT)
    variance = masked_mean(centred_BT.square(), mask_BT)
    whitened_BT = centred_BT * torch.rsqrt(variance + eps)
    return whitened_BT if shift_mean else masked(whitened_BT + mean, mask_BT)


def last_token(mask_BT: Tensor) -> Tensor:
    """Bool (B, T), True on each completion's last masked token; a row without tokens has none."""
    still_to_come_BT = mask_BT.flip(1).cumsum(1).flip(1)
    return mask_BT & (still_to_come_BT == 1)


def kl_k1(log_probs_BT: Tensor, reference_log_probs_BT: Tensor) -> Tensor:
    """k1 = log π - log π_ref: unbiased for KL(π‖π_ref) on tokens drawn from π (Schulman 2020).

    Args:
        log_probs_BT: fp32, of the sampled tokens under π.
        reference_log_probs_BT: fp32, of the same tokens under π_ref.

    Returns:
        fp32 (B, T), meaningless in the padding.
    """
    return log_probs_BT - reference_log_probs_BT


def kl_k3(log_probs_BT: Tensor, reference_log_probs_BT: Tensor) -> Tensor:
    """k3 = (ρ - 1) - log ρ with ρ = π_ref / π: unbiased like k1, never negative, less noisy (Schulman 2020).

    Args:
        log_probs_BT: fp32, of the sampled tokens under π.
        reference_log_probs_BT: fp32, of the same tokens under π_ref.

    Returns:
        fp32 (B, T), meaningless in the padding.
    """
    log_ratio_BT = reference_log_probs_BT - log_probs_BT
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def token_rewards(
    score_B: Tensor,
    log_probs_BT: Tensor,
    reference_log_probs_BT: Tensor,
    mask_BT: Tensor,
    kl_coef: float,
) -> Tensor:
    """PERL's objective (1 - β) r - β KL(π‖π_ref) as a reward for each token.

    Every token gets -β (log π - log π_ref); the completion's last one gets (1 - β) r besides. Summed over an
    completion this is the objective (PERL, arXiv 2403.10704), with KL by its k1 estimate.

    Args:
        score_B: fp32, the reward r of each completion. A completion without tokens gets none.
        log_probs_BT: fp32, under the policy that the rollout is of.
        reference_log_probs_BT: fp32, under the anchor.
        mask_BT: bool.
        kl_coef: β, in [0, 1].

    Returns:
        fp32 (B, T); 0 outside the mask.
    """
    penalty_BT = -kl_coef * masked(kl_k1(log_probs_BT, reference_log_probs_BT), mask_BT)
    return penalty_BT + masked((1.0 - kl_coef) * score_B[:, None].expand_as(mask_BT), last_token(mask_BT))


def _discounted_sums(x_BT: Tensor, discount: float) -> Tensor:
    """y_t = x_t + discount · y_{t+1}, with y = 0 beyond the last position."""
    sums = []
    running_B = torch.zeros_like(x_BT[:, 0])
    for x_B in reversed(x_BT.unbind(dim=1)):
        running_B = x_B + discount * running_B
        sums.append(running_B)
    return torch.stack(sums[::-1], dim=1)


def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = Σ_{l≥0} γ^l r_{t+l} up to the completion's last token: what REINFORCE weighs a token by.

    Args:
        rewards_BT: fp32.
        mask_BT: bool.
        gamma: the discount γ.

    Returns:
        fp32 (B, T); 0 outside the mask.
    """
    return masked(_discounted_sums(masked(rewards_BT, mask_BT), gamma), mask_BT)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16) and the returns they imply.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = Σ_{l≥0} (γλ)^l δ_{t+l}        R_t = A_t + V_t

    The completion ends after its last masked token: the value beyond is 0.

    Args:
        rewards_BT: fp32.
        values_BT: fp32, V of the state before each token; to be detached by the caller.
        mask_BT: bool, without holes.
        gamma: the discount γ.
        lam: λ; 1 gives returns minus values, 0 the one-step temporal difference.

    Returns:
        advantages and returns, fp32 (B, T); 0 outside the mask.
    """
    known_values_BT = masked(values_BT, mask_BT)
    next_values_BT = torch.nn.functional.pad(known_values_BT[:, 1:], (0, 1))
    deltas_BT = masked(rewards_BT, mask_BT) + gamma * next_values_BT - known_values_BT
    advantages_BT = masked(_discounted_sums(deltas_BT, gamma * lam), mask_BT)
    return advantages_BT, advantages_BT + known_values_BT


def leave_one_out(score_B: Tensor, group_size: int) -> Tensor:
    """RLOO's advantage: r_i - mean of the r of the other completions of its prompt.

    (Kool et al. 2019, and for language models Ahmadian et al. 2024, arXiv 2402.14740.) The others'
    mean does not depend on completion i, so it is a baseline that leaves the gradient unbiased.

    Args:
        score_B: fp32; the completions of one prompt stand side by side.
        group_size: completions of one prompt, at least 2.

    Returns:
        fp32 (B).
    """
    assert group_size >= 2, f"leaving one out needs two completions of a prompt, not {group_size}"
    groups = score_B.view(-1, group_size)
    others_mean = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others_mean).flatten()


def policy_gradient_loss(
    log_probs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, normalizer: float
) -> Tensor:
    """-Σ A_t log π(a_t) / normalizer, whose gradient is REINFORCE's (Williams 1992).

    Args:
        log_probs_BT: fp32, of the sampled tokens under the policy being trained.
        advantages_BT: fp32, detached.
        mask_BT: bool.
        normalizer: completion tokens in the whole minibatch.

    Returns:
        fp32 scalar.
    """
    return -(masked(advantages_BT, mask_BT) * masked(log_probs_BT, mask_BT)).sum() / normalizer


def ppo_policy_loss(
    log_probs_BT: Tensor,
    policy_log_probs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip: float,
    normalizer: float,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated.

        ρ_t = π(a_t) / π_old(a_t)        loss = -Σ min(ρ A, clamp(ρ, 1 - c, 1 + c) A) / normalizer

    Args:
        log_probs_BT: fp32, of the sampled tokens under the policy being trained.
        policy_log_probs_BT: fp32, under the policy before the rollout's first update, π_old.
        advantages_BT: fp32, detached.
        mask_BT: bool.
        clip: c.
        normalizer: completion tokens in the whole minibatch.

    Returns:
        the loss, and the share of the minibatch's tokens on which the clip took the gradient away (also
        divided by `normalizer`, so micro-batches' shares add up; detached). Both fp32 scalars.
    """
    ratio_BT = masked(log_probs_BT - policy_log_probs_BT, mask_BT).exp()
    known_advantages_BT = masked(advantages_BT, mask_BT)
    plain_BT = ratio_BT * known_advantages_BT
    clipped_BT = ratio_BT.clamp(1.0 - clip, 1.0 + clip) * known_advantages_BT
    loss = -torch.minimum(plain_BT, clipped_BT).sum() / normalizer
    return loss, (clipped_BT < plain_BT).float().sum() / normalizer


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip: float | None,
    normalizer: float,
) -> Tensor:
    """Half the squared error of the critic, clipped as in PPO's published code (openai/baselines, ppo2).

        loss = ½ Σ max((V - R)², (V_old + clamp(V - V_old, -c, c) - R)²) / normalizer

    Args:
        values_BT: fp32, of the critic being trained.
        old_values_BT: fp32, as they were when the advantages were estimated.
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
