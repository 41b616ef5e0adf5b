"""What the guards of RL know: their limits, one guard's reading of a step, and what they remember."""

import math
import statistics
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

from perl.rl.checks.alarms import Alarm

WINDOW = 5
"""Steps whose median is read."""
START = 5
"""Steps whose median is what the run started at."""
LEAST = -sys.float_info.max
"""Below every reward, and a number that JSON has."""
NOTHING = 1.5
"""Tokens: a completion that is hardly more than its end."""


@dataclass(frozen=True)
class Limits:
    """Where each alarm is certain; chosen on some 40 recorded runs that went well and a dozen that did not."""

    kl: float = (
        50.0  # nats per completion; healthy runs end at 0.3 to 12, exploding ones pass 50 on the way to hundreds
    )
    entropy: float = 0.1  # share of the start's; healthy runs keep a half and more
    entropy_nats: float = 0.1  # nats per token, below which no reward excuses it
    ended: float = 0.05  # share of completions that end by themselves, where at least half did at the start
    length: float = 0.5  # share of the start's, if the reward has fallen too
    penalized: bool = False  # whether completions without an end are penalised
    reward: float = 2.0  # standard deviations from step to step that a fallen reward lies below its best
    entropy_rise: float = 1.8  # share of the start's, if the reward has not risen
    entropy_rise_nats: float = 0.25  # and by so much at least
    mismatch: float = 1e-3  # nats per token between sampler and policy that are harmless in this dtype
    mismatch_rise: float = 4.0  # share of the first step's mismatch
    movement: float = 3e-3  # nats per token that the policy will have moved by at the end; less is nothing learned
    no_movement: float = 1e-4  # less than this stops the run
    learning_rate: float = 0.0  # of the run, from which the alarm works out a better one
    flat: int = 10  # steps in a row whose rewards were all equal
    flat_for_good: int = 50  # so many stop the run
    fall: float = 4.0  # standard errors of the validation score below its best, while the reward rises
    refused: int = 3  # updates refused in a row
    check_every: int = 10  # steps from one validation score to the next


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
    """Sum of squared differences from step to step."""
    count: int = 0

    def add(self, value: float) -> None:
        if self.last:
            self.squares += (value - self.last[-1]) ** 2
        self.first = [*self.first, value][:START]
        self.last = [*self.last, value][-WINDOW:]
        self.count += 1

    @property
    def now(self) -> float:
        """The median of the last steps; NaN while there are too few."""
        return statistics.median(self.last) if len(self.last) > WINDOW // 2 else math.nan

    @property
    def start(self) -> float:
        """The median of the first steps; NaN before they are past."""
        return statistics.median(self.first) if len(self.first) == START else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation from step to step; of differences, so that a trend hardly shows in it."""
        return math.sqrt(self.squares / (self.count - 1) / 2) if self.count > 1 else math.nan


@dataclass
class Trouble:
    """What shows now."""

    since: int
    good_until: int
    grave: bool | None = None
    """Of the alarm that was raised; None: none was."""


@dataclass
class Validation:
    """The mean of the gold judge, or of the reward on held-out prompts, with its standard error."""

    mean: float
    error: float
    reward: float
    """In training, meanwhile."""
    step: int


@dataclass
class Memory:
    """All that a guard remembers."""

    metrics: dict[str, Series] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    best_reward: float = LEAST
    refused: int = 0
    """Updates in a row."""
    flat: int = 0
    """Steps in a row without a signal."""
    gold: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Both since the last validation score."""
    best: Validation | None = None
    alarms: list[Alarm] = field(default_factory=list)
