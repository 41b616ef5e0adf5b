"""What a comparison of RL with a baseline came to: what compare.json holds, and the page reads."""

from dataclasses import dataclass

from perl.measure.two_runs import Comparison


@dataclass(frozen=True)
class Reached:
    """Means of a policy after so many steps; KL in nats per completion."""

    step: int
    kl: float
    reward: float
    gold: float | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineResult:
    """A baseline beside RL.

    Attributes:
        rows, learns_from: how many of what it was trained on.
        peak_memory_bytes: of its steps, as a stage's.
        policies, rl_policies: of both, on the way, from the policy that they start from.
        kl: at which they are compared.
        matched: first the baseline, second RL.
        belongs: what it was made from.
    """

    method: str
    seed: int
    learning_rate: float
    rows: int
    learns_from: str
    steps: int
    seconds: float
    peak_memory_bytes: int
    policies: list[Reached]
    rl_policies: list[Reached]
    kl: float
    matched: Comparison
    belongs: str
