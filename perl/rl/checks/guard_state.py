"""State of the guards of RL: their limits, one guard's reading of a step, and what they remember."""

import math
import statistics
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

from perl.rl.checks.alarms import Alarm

WINDOW = 5
"""Number of latest steps whose median is read."""
START = 5
"""Number of first steps whose median is the value at the start."""
LEAST = -sys.float_info.max
"""Lower than every reward, and representable in JSON."""
NOTHING = 1.5
"""Tokens of a completion that consists of little more than its end."""


@dataclass(frozen=True)
class Limits:
    """Limits of the alarms; chosen on some 40 recorded runs that went well and a dozen that did not."""

    kl: float = 50.0  # nats per completion; healthy runs end at 0.3 to 12, exploding ones reach hundreds
    entropy: float = 0.1  # share of the value at the start; healthy runs keep half of it or more
    entropy_nats: float = 0.1  # nats per token; below this a rise of the reward is no excuse
    ended: float = 0.05  # share of completions that end by themselves, if at least half did at the start
    length: float = 0.5  # share of the value at the start, if the reward has fallen too
    penalized: bool = False  # whether completions that do not end are penalised
    reward: float = 2.0  # distance of a fallen reward from its best, in step-to-step standard deviations
    entropy_rise: float = 1.8  # multiple of the value at the start, if the reward has not risen
    entropy_rise_nats: float = 0.25  # smallest rise in nats per token
    mismatch: float = 1e-3  # harmless difference of sampler and policy in this dtype, nats per token
    mismatch_rise: float = 4.0  # multiple of the first step's mismatch
    movement: float = 3e-3  # predicted movement of the policy by the end, nats per token; less is nothing learned
    no_movement: float = 1e-4  # a smaller movement stops the run
    step_key: str = "learning_rate"  # key that sets the size of the policy's steps, or "trust_region"
    step_size: float = 0.0  # its value in this run; the alarm derives a better one from it
    flat: int = 10  # consecutive steps whose rewards were all equal
    flat_for_good: int = 50  # number of such steps that stops the run
    fall: float = 4.0  # standard errors by which the validation score is below its best while the reward rises
    refused: int = 3  # consecutive refused updates
    check_every: int = 10  # steps between validation scores
    kl_term: bool = True  # whether a KL term holds the policy to its reference
    hold: str = "raise rl.kl_coef"  # what keeps the policy closer to its reference under this algorithm


class Reading(NamedTuple):
    """One guard's view of a step."""

    name: str
    value: float
    limit: float
    start: float
    shows: bool
    certain: bool
    grave: bool = True
    since: int = 0
    good_until: int = 0


@dataclass
class Series:
    """A metric over the steps so far."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    squares: float = 0.0
    """Sum of squared differences between consecutive steps."""
    count: int = 0

    def add(self, value: float) -> None:
        if self.last:
            self.squares += (value - self.last[-1]) ** 2
        self.first = [*self.first, value][:START]
        self.last = [*self.last, value][-WINDOW:]
        self.count += 1

    @property
    def now(self) -> float:
        """Median of the last steps; NaN while there are too few."""
        return statistics.median(self.last) if len(self.last) > WINDOW // 2 else math.nan

    @property
    def start(self) -> float:
        """Median of the first steps; NaN until they are complete."""
        return statistics.median(self.first) if len(self.first) == START else math.nan

    @property
    def deviation(self) -> float:
        """Step-to-step standard deviation, from differences, so that a trend hardly affects it."""
        return math.sqrt(self.squares / (self.count - 1) / 2) if self.count > 1 else math.nan


@dataclass
class Trouble:
    """A trouble that is currently visible."""

    since: int
    good_until: int
    grave: bool | None = None
    """Whether the raised alarm is grave; None: no alarm was raised."""


@dataclass
class Validation:
    """Mean of the gold judge, or of the reward on held-out prompts, and its standard error."""

    mean: float
    error: float
    reward: float
    """Mean training reward over the same steps."""
    step: int


@dataclass
class Memory:
    """The whole state of a guard."""

    metrics: dict[str, Series] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    best_reward: float = LEAST
    doublings: int = 0
    """Largest number of times that the KL had doubled from a 32nd of its limit."""
    refused: int = 0
    """Consecutive refused updates."""
    flat: int = 0
    """Consecutive steps without a signal."""
    gold: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Gold scores and rewards since the last validation score."""
    best: Validation | None = None
    alarms: list[Alarm] = field(default_factory=list)
