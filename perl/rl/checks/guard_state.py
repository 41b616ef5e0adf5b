"""What the guards of RL know: their limits, one guard's view of a step, and all that they remember."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from perl.rl.checks.alarms import Alarm

WINDOW = 5
START = 5
NOTHING = 1.5
"""Tokens: a completion that is hardly more than its end."""


@dataclass(frozen=True)
class Limits:
    """Where each alarm is certain; chosen on some 40 recorded runs that went well and a dozen that did not."""

    kl: float = 50.0
    """Nats a completion. Healthy runs here end at 0.3 to 12; those that explode pass 50 on the way to hundreds."""
    entropy: float = 0.1
    """Share of the start's entropy. Healthy runs keep a half and more."""
    entropy_nats: float = 0.1
    """Nats a token below which no reward excuses it."""
    ended: float = 0.05
    """Share of completions that still end by themselves, where at the start at least half of them did."""
    length: float = 0.5
    """Share of the start's length, if the score has fallen too: short completions that score more are welcome."""
    penalized: bool = False
    """Whether completions without an end are penalised."""
    reward: float = 2.0
    """By so many of its standard deviations from step to step the reward then lies below its best."""
    entropy_rise: float = 1.8
    """Share of the start's entropy, if the reward has not risen."""
    entropy_rise_nats: float = 0.25
    """And by so much at least: next to nothing doubles soon."""
    mismatch: float = 1e-3
    """Nats a token between sampler and policy that are harmless, in this dtype."""
    mismatch_rise: float = 4.0
    """Share of the mismatch that the first step had."""
    movement: float = 3e-3
    """Nats a token that the policy will have moved by at the end: less is nothing learned."""
    no_movement: float = 1e-4
    """And less than this is worth no further step."""
    learning_rate: float = 0.0
    """The full one, from which the alarm works out a better one."""
    flat: int = 10
    """Steps in a row whose rewards were all equal."""
    flat_for_good: int = 50
    """So many are worth no further step."""
    fall: float = 4.0
    """Standard errors by which the check falls below its best, while the reward rises."""
    refused: int = 3
    """Updates refused in a row."""
    check_every: int = 10
    """Steps from one look at the check to the next: the gold judge's mean over them, or a held-out figure."""


class Reading(NamedTuple):
    """One guard's view of a step."""

    name: str
    value: float
    limit: float
    start: float
    shows: bool
    certain: bool
    since: int
    good_until: int
    grave: bool = True


@dataclass
class Check:
    """The best the gold judge, or the held-out check, has said so far."""

    mean: float
    error: float
    reward: float
    step: int


@dataclass
class Memory:
    """All that a guard remembers; plain values."""

    first: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    last: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    squares: dict[str, float] = dataclasses.field(default_factory=dict)
    """Sums of squared differences from step to step."""
    seen: dict[str, int] = dataclasses.field(default_factory=dict)
    best_reward: float = -math.inf
    refused: int = 0
    """Updates in a row."""
    flat: int = 0
    """Steps in a row without a signal."""
    since: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of what shows now: since which step."""
    good_until: dict[str, int] = dataclasses.field(default_factory=dict)
    raised: list[str] = dataclasses.field(default_factory=list)
    """Of what shows now: what was said already."""
    grave: list[str] = dataclasses.field(default_factory=list)
    """Of that: what was said to be grave."""
    gold: list[float] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    """Both since the last look at the check."""
    best: Check | None = None
    alarms: list[Alarm] = dataclasses.field(default_factory=list)
