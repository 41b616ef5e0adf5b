"""What RL came to: the policy before and after, on the same held-out prompts."""

from dataclasses import dataclass
from typing import Literal

from perl.measure.bootstrap import Interval
from perl.measure.change import fixed, places_of
from perl.system.progress import counted

PairedMetric = Literal["reward", "gold", "answer_tokens", "ended"]


@dataclass(frozen=True)
class Change:
    """A metric before and after RL, and the 95 % interval of its change, paired by prompt."""

    before: float
    after: float
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class PassAtK(Change):
    """pass@k by the rules of the reward (`perl.rl.evaluate`), and 95 % intervals of both ends."""

    k: int
    before_interval: Interval | None
    after_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class RewardHistogram:
    """How many held-out prompts have a mean reward between two edges, before RL and after it."""

    edges: list[float]
    before: list[int]
    after: list[int]


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The best of n completions by the policy before RL, by reward, beside RL's policy on the same prompts.

    Attributes:
        kl: nats per completion.
        reward_interval, gold_interval: of RL's policy less best-of-n, 95 %, paired by prompt.
    """

    n: int
    kl: float
    prompts: int
    reward: float
    rl_reward: float
    reward_interval: Interval | None = None
    gold: float | None = None
    rl_gold: float | None = None
    gold_interval: Interval | None = None


def _beside(best: float, policy: float, interval: Interval | None) -> str:
    places = places_of(interval[1] - interval[0] if interval else abs(policy - best))
    ends = [] if interval is None else [fixed(end, places, sign=True) for end in interval]
    told = f" (95 % interval of the difference: {ends[0]} to {ends[1]})" if ends else ""
    return f"{fixed(best, places)}, of RL's policy {fixed(policy, places)}{told}"


@dataclass(frozen=True, kw_only=True)
class PolicyChange:
    """The policy before and after RL, on the same `n` held-out prompts.

    Attributes:
        samples_per_prompt: completions of each.
        reward_before, reward_after: raw rewards, as the means of all other metrics.
        reward_interval: of the change (95 %, paired by prompt), as all others; None where all prompts are of one
            dialogue.
        reward_histogram: of the prompts' means.
        reward_parts_before, reward_parts_after: means before weighting, by name.
        pass_at: where the reward has rules; `pass_at_1_before` and `pass_at_1_after` are its values at k = 1.
        gold_before: where there is a judge.
        kl: of the policy to its reference, nats per completion.
    """

    n: int
    samples_per_prompt: int | None = None
    reward_before: float
    reward_after: float
    reward_interval: Interval | None = None
    reward_histogram: RewardHistogram | None = None
    reward_parts_before: dict[str, float] | None = None
    reward_parts_after: dict[str, float] | None = None
    pass_at: list[PassAtK] | None = None
    pass_at_1_before: float | None = None
    pass_at_1_after: float | None = None
    gold_before: float | None = None
    gold_after: float | None = None
    gold_interval: Interval | None = None
    answer_tokens_before: float
    answer_tokens_after: float
    answer_tokens_interval: Interval | None = None
    ended_before: float
    ended_after: float
    ended_interval: Interval | None = None
    kl: float
    kl_interval: Interval | None = None

    def change(self, metric: PairedMetric) -> Change | None:
        """A metric's change; None for gold without a judge."""
        before, after, interval = (getattr(self, f"{metric}_{key}") for key in ("before", "after", "interval"))
        return None if before is None or after is None else Change(before, after, interval)


@dataclass(frozen=True, kw_only=True)
class RlEval(PolicyChange):
    """What RL came to, and what its policy is compared with."""

    algorithm: str
    critic: str
    steps: int
    best_of_n: list[BestOfN] | None = None

    @property
    def best_of_n_words(self) -> str:
        """The one whose KL is nearest to the policy's, beside it."""
        if not self.best_of_n:
            return ""
        one = min(self.best_of_n, key=lambda best: abs(best.kl - self.kl))
        ends = [f"reward {_beside(one.reward, one.rl_reward, one.reward_interval)}"]
        if one.gold is not None and one.rl_gold is not None:
            ends.append(f"gold {_beside(one.gold, one.rl_gold, one.gold_interval)}")
        return (
            f"Against the best of {one.n} completions by the policy before RL (KL {one.kl:.2f}, no training), on "
            f"{counted(one.prompts, 'prompt')}: {'; '.join(ends)}."
        )
