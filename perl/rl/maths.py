"""The arithmetic of RL on completions: KL, token rewards, advantages. Pure functions of tensors.

Axis letters: B completions, T completion positions. Tensors are fp32 unless stated otherwise; masks are bool, True
on the completion's tokens. Completions are right-padded. Values in the padding, including NaN and infinity, affect
neither results nor gradients, and results are 0 there (except the per-token KL estimates, which take no mask).

References: Schulman et al. 2016 (GAE, arXiv 1506.02438); Schulman 2020 (joschu.net/blog/kl-approx.html); Kool et
al. 2019 and Ahmadian et al. 2024 (RLOO, arXiv 2402.14740); Shao et al. 2024 (GRPO, arXiv 2402.03300); MaxRL
(arXiv 2602.02710); PERL (arXiv 2403.10704).

Departures from PERL: none in the objective; the KL term is applied per token as its k1 estimate, so that the
critic and GAE see it where it arises.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, as TRL does; verl adds 1e-6."""


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` where `mask` is True, else 0. Apply it before any arithmetic: 0 × NaN in a gradient is NaN."""
    return x.masked_fill(~mask, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the masked entries, Σ m x / Σ m; 0 if there are none.

    Args:
        x: fp32, any shape.
        mask: bool, same shape as `x`.

    Returns:
        fp32 scalar.
    """
    return masked(x, mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Normalise the masked entries to mean 0 and variance 1: (x - μ) / √(σ² + 1e-8), with their own μ and σ².

    σ² is the population variance (divided by n). A single entry, or equal entries, give 0 and not NaN. Same as
    `whiten` in openai/lm-human-preferences (Ziegler et al. 2019, arXiv 1909.08593).

    Args:
        x_BT: fp32.
        mask_BT: bool.

    Returns:
        fp32 (B, T); 0 outside the mask.
    """
    mean = masked_mean(x_BT, mask_BT)
    centred_BT = masked(x_BT - mean, mask_BT)
    variance = masked_mean(centred_BT.square(), mask_BT)
    return centred_BT * torch.rsqrt(variance + 1e-8)


def last_token(mask_BT: Tensor) -> Tensor:
    """Return bool (B, T), True on each completion's last masked token; nowhere in a row without tokens."""
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


def kl_k2(log_probs_BT: Tensor, reference_log_probs_BT: Tensor) -> Tensor:
    """k2 = ½ (log π - log π_ref)²: biased, but its gradient is the KL's on tokens drawn from π (Schulman 2020).

    Args:
        log_probs_BT: fp32, of the sampled tokens under π.
        reference_log_probs_BT: fp32, of the same tokens under π_ref.

    Returns:
        fp32 (B, T), meaningless in the padding.
    """
    return 0.5 * (log_probs_BT - reference_log_probs_BT).square()


def kl_k3(log_probs_BT: Tensor, reference_log_probs_BT: Tensor) -> Tensor:
    """k3 = (ρ - 1) - log ρ with ρ = π_ref / π: unbiased like k1, never negative, less noisy (Schulman 2020).

    Unbiased as an estimate of the KL; its gradient is that of KL(π_ref‖π).

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
    """Return PERL's objective (1 - β) r - β KL(π‖π_ref) as a reward per token.

    Every token gets -β (log π - log π_ref), and the completion's last token also gets (1 - β) r. The sum over a
    completion is the objective (PERL, arXiv 2403.10704) with the k1 estimate of the KL.

    Args:
        score_B: fp32, the reward r of each completion. A completion without tokens gets no reward.
        log_probs_BT: fp32, under the policy that sampled the rollout.
        reference_log_probs_BT: fp32, under the reference.
        mask_BT: bool.
        kl_coef: β, in [0, 1].

    Returns:
        fp32 (B, T); 0 outside the mask.
    """
    penalty_BT = -kl_coef * masked(kl_k1(log_probs_BT, reference_log_probs_BT), mask_BT)
    return penalty_BT + masked((1.0 - kl_coef) * score_B[:, None].expand_as(mask_BT), last_token(mask_BT))


def _discounted_sums(x_BT: Tensor, discount: float) -> Tensor:
    """Return y_t = x_t + discount · y_{t+1}, with y = 0 after the last position."""
    sums = []
    running_B = torch.zeros_like(x_BT[:, 0])
    for x_B in reversed(x_BT.unbind(dim=1)):
        running_B = x_B + discount * running_B
        sums.append(running_B)
    return torch.stack(sums[::-1], dim=1)


def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return G_t = Σ_{l≥0} r_{t+l} up to the completion's last token, REINFORCE's weight of a token. γ is 1.

    Args:
        rewards_BT: fp32.
        mask_BT: bool.

    Returns:
        fp32 (B, T); 0 outside the mask.
    """
    return masked(_discounted_sums(masked(rewards_BT, mask_BT), 1.0), mask_BT)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalized advantage estimates (Schulman et al. 2016, eq. 16) and the returns that they imply.

        δ_t = r_t + V_{t+1} - V_t        A_t = Σ_{l≥0} λ^l δ_{t+l}        R_t = A_t + V_t

    The discount γ is 1. The completion ends after its last masked token: the value after it is 0.

    Args:
        rewards_BT: fp32.
        values_BT: fp32, V of the state before each token; detached.
        mask_BT: bool, without holes.
        lam: λ; 1 gives returns minus values, 0 the one-step temporal difference.

    Returns:
        advantages and returns, fp32 (B, T); 0 outside the mask.
    """
    known_values_BT = masked(values_BT, mask_BT)
    next_values_BT = torch.nn.functional.pad(known_values_BT[:, 1:], (0, 1))
    deltas_BT = masked(rewards_BT, mask_BT) + next_values_BT - known_values_BT
    advantages_BT = masked(_discounted_sums(deltas_BT, lam), mask_BT)
    return advantages_BT, advantages_BT + known_values_BT


def importance_weights(
    policy_log_probs_BT: Tensor, sampler_log_probs_BT: Tensor, mask_BT: Tensor, limit: float
) -> Tensor:
    """Return truncated importance weights, min(π_old / μ, C), of tokens drawn by a sampler μ, not the policy.

    See Ionides 2008, and for rollouts of another engine Yao et al. 2025 (fengyao.notion.site/off-policy-rl). They
    are 1 where both agree.

    Args:
        policy_log_probs_BT: fp32, log π_old of the tokens.
        sampler_log_probs_BT: fp32, log μ.
        mask_BT: bool.
        limit: C.

    Returns:
        fp32 (B, T); 1 outside the mask.
    """
    return masked(policy_log_probs_BT - sampler_log_probs_BT, mask_BT).exp().clamp(max=limit)


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """Return the next β by Ziegler et al. 2019 (arXiv 1909.08593, 2.2): β (1 + K clip(KL/target - 1, -0.2, 0.2)).

    K is 0.1, as there. β stays below 1, at which the reward would have no weight.

    Args:
        kl_coef: β.
        kl: KL of the rollout, in nats per completion.
        target: target KL, in nats per completion.
    """
    error = min(0.2, max(-0.2, kl / target - 1.0))
    return min(0.99, kl_coef * (1.0 + 0.1 * error))


def leave_one_out(score_B: Tensor, group_size: int) -> Tensor:
    """Return RLOO's advantage: r_i minus the mean reward of the other completions of its prompt.

    See Kool et al. 2019, and for language models Ahmadian et al. 2024 (arXiv 2402.14740). The mean of the others
    does not depend on completion i, so this baseline leaves the gradient unbiased.

    Args:
        score_B: fp32; completions of one prompt are adjacent.
        group_size: completions per prompt, at least 2.

    Returns:
        fp32 (B).
    """
    assert group_size >= 2, f"leaving one out needs two completions of a prompt, not {group_size}"
    groups = score_B.view(-1, group_size)
    others_mean = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others_mean).flatten()


def equal_groups(score_B: Tensor, group_size: int, tolerance: float) -> Tensor:
    """Return which completions belong to a group whose scores are all equal.

    Args:
        score_B: fp32; completions of one prompt are adjacent.
        group_size: completions per prompt.
        tolerance: the largest difference that counts as equal, as a share of 1 + the batch's largest |score|.

    Returns:
        bool (B).
    """
    groups = score_B.view(-1, group_size)
    spread = groups.amax(1) - groups.amin(1)
    return (spread <= tolerance * (1.0 + score_B.abs().max())).repeat_interleave(group_size)


def _groups(score_B: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the scores with one row per group, and the groups' means as a column."""
    assert group_size >= 2, f"comparing needs two completions of a prompt, not {group_size}"
    groups = score_B.view(-1, group_size)
    return groups, groups.mean(1, keepdim=True)


def group_mean(score_B: Tensor, group_size: int) -> Tensor:
    """Return r_i - r̄, r̄ the mean of its group (Dr. GRPO, arXiv 2503.20783). Arguments as in `leave_one_out`."""
    groups, means = _groups(score_B, group_size)
    return (groups - means).flatten()


def group_std(score_B: Tensor, group_size: int) -> Tensor:
    """Return GRPO's advantage, (r_i - r̄) / (σ + ε), with σ² divided by G - 1. Arguments as in `leave_one_out`."""
    groups, means = _groups(score_B, group_size)
    return ((groups - means) / (groups.std(1, keepdim=True) + STD_FLOOR)).flatten()


def group_relative(score_B: Tensor, group_size: int) -> Tensor:
    """Return MaxRL's advantage, (r_i - r̄) / r̄, and 0 where r̄ ≤ 0. Arguments as in `leave_one_out`.

    For rewards of 0 and 1, its expected gradient is that of a truncated log-likelihood of success; the plain
    advantage's is that of the success rate.
    """
    groups, means = _groups(score_B, group_size)
    positive = means > 0
    return torch.where(positive, (groups - means) / torch.where(positive, means, 1.0), 0.0).flatten()


GROUP_ADVANTAGES: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "group": group_mean,
    "group-std": group_std,
    "leave-one-out": leave_one_out,
    "group-relative": group_relative,
}
"""Advantages by the names in `perl.rl.algorithm`; the KL losses below likewise."""
KL_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"loss-k2": kl_k2, "loss-k3": kl_k3}
