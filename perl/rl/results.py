"""Results of RL: the policy before and after, on the same held-out prompts."""

from dataclasses import dataclass
from typing import Literal

from perl.measure.bootstrap import Interval
from perl.measure.change import Change, fixed, places_of
from perl.system.progress import counted

PairedMetric = Literal["reward", "gold", "answer_tokens", "ended"]


@dataclass(frozen=True, kw_only=True)
class PassAtK(Change):
    """pass@k by the rules of the reward (`perl.rl.evaluate`), with 95 % intervals of both values."""

    k: int
    before_interval: Interval | None
    after_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class RewardHistogram:
    """Number of held-out prompts whose mean reward lies between two edges, before and after RL."""

    edges: list[float]
    before: list[int]
    after: list[int]


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The best of n completions of the policy before RL, by reward, and RL's policy on the same prompts.

    Attributes:
        kl: nats per completion.
        reward_interval, gold_interval: 95 % intervals of RL's policy minus best-of-n, paired by prompt.
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
    return f"{fixed(best, places)}, RL's policy {fixed(policy, places)}{told}"


@dataclass(frozen=True, kw_only=True)
class PolicyChange:
    """The policy before and after RL, on the same `n` held-out prompts.

    Attributes:
        samples_per_prompt: completions per prompt.
        reward_before, reward_after: means of the raw rewards; the other metrics are means, too.
        reward_interval: 95 % interval of the change, paired by prompt, like all others; None if all prompts belong
            to one dialogue.
        reward_histogram: histogram of the prompts' means.
        reward_parts_before, reward_parts_after: means before weighting, by name.
        pass_at: pass@k, if the reward has rules; `pass_at_1_before` and `pass_at_1_after` are its values at k = 1.
        gold_before: mean gold score, if there is a judge.
        kl: KL of the policy to its reference, nats per completion.
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
        """Return a metric's change; None for gold without a judge."""
        before, after, interval = (getattr(self, f"{metric}_{key}") for key in ("before", "after", "interval"))
        return None if before is None or after is None else Change(before, after, interval)


@dataclass(frozen=True, kw_only=True)
class RlEval(PolicyChange):
    """Results of RL, and the best-of-n results with which its policy is compared."""

    algorithm: str
    critic: str
    steps: int
    best_of_n: list[BestOfN] | None = None

    @property
    def best_of_n_words(self) -> str:
        """The best-of-n result whose KL is nearest to the policy's, compared with the policy, in words."""
        if not self.best_of_n:
            return ""
        one = min(self.best_of_n, key=lambda best: abs(best.kl - self.kl))
        ends = [f"reward {_beside(one.reward, one.rl_reward, one.reward_interval)}"]
        if one.gold is not None and one.rl_gold is not None:
            ends.append(f"gold {_beside(one.gold, one.rl_gold, one.gold_interval)}")
        return (
            f"Compared with the best of {one.n} completions before RL (KL {one.kl:.2f}, no training), on "
            f"{counted(one.prompts, 'prompt')}: {'; '.join(ends)}."
        )
