"""The table of algorithms, one row each: how a rollout becomes advantages and advantages become a loss.

`perl-rlhf algorithms` prints the table. A row sets five switches and some constants; a recipe may override any
of them (`rl.surrogate: clip-weight`). docs/algorithms.md explains when to use each row.

Departures from the PERL paper (arXiv 2403.10704), which uses REINFORCE with a learned baseline and a terminal
reward: the KL term is applied at the tokens where it arises, the baseline is the value of each token's state, and
    advantages are whitened over the rollout. γ is 1, as in the paper.

Unless the row says otherwise, rewards are normalised first (`perl.rl.rewards.scale`). Returns and the critic's
targets are therefore of the order of 1 whatever the unit of the user's reward, and the constants below have the
same meaning everywhere.
"""

from typing import Any

from perl.rl.algorithm import Advantage, Algorithm, Surrogate


def _of_groups(advantage: Advantage, surrogate: Surrogate, **cells: Any) -> Algorithm:
    """Return a row that compares groups, with the samples per prompt and epochs that were measured for RLOO."""
    return Algorithm(advantage, surrogate, **{"samples_per_prompt": 4, "epochs": 2} | cells)


ALGORITHMS: dict[str, Algorithm] = {
    # Williams 1992, with a learned baseline
    "reinforce": Algorithm("return", "plain", whiten=True),
    # Schulman et al. 2017, arXiv 1707.06347
    "ppo": Algorithm("gae", "clip", whiten=True, epochs=2),
    # Hu et al. 2025, arXiv 2501.03262, both
    "reinforce++": Algorithm("return", "clip", whiten=True, value_baseline=False, epochs=2),
    "reinforce++-baseline": _of_groups("group", "clip", kl="loss-k2", whiten=True),
    # Ahmadian et al. 2024, arXiv 2402.14740
    "rloo": _of_groups("leave-one-out", "clip"),
    # Shao et al. 2024, arXiv 2402.03300
    "grpo": _of_groups("group-std", "clip", average="answers", kl="loss-k3"),
    # Liu et al. 2025, arXiv 2503.20783
    "dr-grpo": _of_groups("group", "clip", average="constant", kl="none"),
    # Yu et al. 2025, arXiv 2503.14476
    "dapo": _of_groups("group-std", "clip", kl="none", clip_high=0.28, drop_equal_groups=True, redraws=3),
    # Zheng et al. 2025, arXiv 2507.18071
    "gspo": _of_groups(
        "group-std", "clip", ratio="answer", average="answers", kl="loss-k3", clip=3e-4, clip_high=4e-4
    ),
    # MiniMax 2025, arXiv 2506.13585; no lower bound, as in the paper; upper bound 5, as in TRL
    # Half the rate: in the second epoch all tokens keep their gradient, and no KL holds the policy
    "cispo": _of_groups("group-std", "clip-weight", kl="none", clip=1.0, clip_high=4.0, rate_factor=0.5),
    # Schulman et al. 2015, arXiv 1502.05477
    "trpo": Algorithm("gae", "ratio", whiten=True, direction="natural", trust_region=0.001),
    # arXiv 2602.02710
    "maxrl": _of_groups("group-relative", "clip", average="answers", kl="loss-k3", normalize_rewards=False),
    # Kimi Team 2025 (k1.5), arXiv 2501.12599, section 2.3.2
    "kimi": _of_groups("group", "mirror", average="answers", kl="none", reset_optimizer=True),
}
"""The rows, by their names in recipes."""
