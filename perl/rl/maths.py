"""The arithmetic of RL on completions: KL, rewards of tokens, advantages. Pure functions of tensors.

Axes: B completions, T positions in them. Every tensor is fp32 unless said otherwise; every mask is bool, True on
the completion's tokens. Completions are right-padded. Whatever stands in the padding, NaN and infinity included,
reaches neither a result nor a gradient, and results are 0 there (the per-token KL estimates, which take no mask,
apart).

References: Schulman et al. 2016 (GAE, arXiv 1506.02438); Schulman 2020 (joschu.net/blog/kl-approx.html); Kool et
al. 2019 and Ahmadian et al. 2024 (RLOO, arXiv 2402.14740); Shao et al. 2024 (GRPO, arXiv 2402.03300); MaxRL
(arXiv 2602.02710); PERL (arXiv 2403.10704).

Departures from PERL: none in the objective; the KL term is spread over the tokens by its k1 estimate, so that
the critic and the discounting see it where it arises.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, as TRL does; verl adds 1e-6."""


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


def masked_whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Shift and scale the masked entries to mean 0 and variance 1, (x - μ) / √(σ² + 1e-8), μ and σ² over them.

    σ² is the population's (divided by n). One entry, or entries all alike, become 0 and not NaN. The form is
    that of `whiten` in openai/lm-human-preferences (Ziegler et al. 2019, arXiv 1909.08593).

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


def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """G_t = Σ_{l≥0} r_{t+l} up to the completion's last token: what REINFORCE weighs a token by. γ is 1.

    Args:
        rewards_BT: fp32.
        mask_BT: bool.

    Returns:
        fp32 (B, T); 0 outside the mask.
    """
    return masked(_discounted_sums(masked(rewards_BT, mask_BT), 1.0), mask_BT)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16) and the returns they imply.

        δ_t = r_t + V_{t+1} - V_t        A_t = Σ_{l≥0} λ^l δ_{t+l}        R_t = A_t + V_t

    The discount γ is 1. The completion ends after its last masked token: the value beyond is 0.

    Args:
        rewards_BT: fp32.
        values_BT: fp32, V of the state before each token; to be detached by the caller.
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
    """Truncated importance sampling, min(π_old / μ, C): of tokens that a sampler μ drew in the policy's place.

    (Ionides 2008; for rollouts of another engine Yao et al. 2025, fengyao.notion.site/off-policy-rl.) 1 where both
    say the same.

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
    """The next β of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2): β (1 + K clip(KL/target - 1, -0.2, 0.2)).

    K is 0.1, as there. β stays below 1, where the reward would have no weight.

    Args:
        kl: of the rollout, nats per completion.
        target: the same.
    """
    error = min(0.2, max(-0.2, kl / target - 1.0))
    return min(0.99, kl_coef * (1.0 + 0.1 * error))


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


def equal_groups(score_B: Tensor, group_size: int, tolerance: float) -> Tensor:
    """Which completions are of a group whose scores do not differ.

    Args:
        score_B: fp32; the completions of one prompt stand side by side.
        group_size: completions of one prompt.
        tolerance: the largest difference that counts as none, as a share of 1 + the batch's largest score.

    Returns:
        bool (B).
    """
    groups = score_B.view(-1, group_size)
    spread = groups.amax(1) - groups.amin(1)
    return (spread <= tolerance * (1.0 + score_B.abs().max())).repeat_interleave(group_size)


def _groups(score_B: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """A row for each group, and the groups' means as a column."""
    assert group_size >= 2, f"comparing needs two completions of a prompt, not {group_size}"
    groups = score_B.view(-1, group_size)
    return groups, groups.mean(1, keepdim=True)


def group_mean(score_B: Tensor, group_size: int) -> Tensor:
    """r_i - r̄: against the mean of its own group (Dr. GRPO, arXiv 2503.20783). Arguments as `leave_one_out`."""
    groups, means = _groups(score_B, group_size)
    return (groups - means).flatten()


def group_std(score_B: Tensor, group_size: int) -> Tensor:
    """GRPO's advantage, (r_i - r̄) / (σ + ε), σ² divided by G - 1. Arguments as `leave_one_out`."""
    groups, means = _groups(score_B, group_size)
    return ((groups - means) / (groups.std(1, keepdim=True) + STD_FLOOR)).flatten()


def group_relative(score_B: Tensor, group_size: int) -> Tensor:
    """MaxRL's advantage, (r_i - r̄) / r̄, and 0 where r̄ ≤ 0. Arguments as `leave_one_out`.

    Of rewards of 0 and 1 its mean gradient is that of a truncated log-likelihood of success, where the plain
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
"""By the names in `perl.rl.algorithm`, as are the estimates below."""
KL_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"loss-k2": kl_k2, "loss-k3": kl_k3}
