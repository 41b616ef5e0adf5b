"""Results of a comparison of RL with a baseline, which are written to compare.json and shown on the page."""

from dataclasses import dataclass

from perl.measure.two_runs import Comparison


@dataclass(frozen=True)
class Reached:
    """Mean metrics of a policy after a number of steps; KL in nats per completion."""

    step: int
    kl: float
    reward: float
    gold: float | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineResult:
    """A baseline compared with RL.

    Attributes:
        rows, learns_from: number and kind of the rows that it was trained on.
        peak_memory_bytes: peak memory of its steps, measured as for a stage.
        policies, rl_policies: the policies of both, from the common starting policy to the last.
        kl: the KL at which they are compared.
        matched: the comparison, with the baseline first and RL second.
        belongs: identifies what the comparison was made from.
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
