"""Guards: they read the figures of each step, and say when training has gone wrong and until when it was right.

A guard reads the median of the last `WINDOW` steps, so that three bad steps of five count and a single one does
not. Two marks make an alarm: at the first the trouble begins to show, at the second it is certain. What was right
is what came before the first. Most marks are shares of what the first `START` steps showed, because a tenth of a
nat of entropy is collapse to one model and daily life to another.

A step's figures are of the policy before that step's update.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from perl.rl.alarms import WORDS, Alarm

WINDOW = 5
START = 5
NOTHING = 1.5
"""Tokens: an answer that is hardly more than its end."""


@dataclass(frozen=True)
class Limits:
    """Where each alarm is certain; chosen on some 40 recorded runs that went well and a dozen that did not."""

    kl: float = 50.0
    """Nats an answer. Healthy runs here end at 0.3 to 12; those that explode pass 50 on their way to hundreds."""
    entropy: float = 0.1
    """Share of the start's entropy. Healthy runs keep a half and more."""
    ended: float = 0.05
    """Share of answers that still end by themselves, where at the start at least half of them did."""
    length: float = 0.5
    """Share of the start's length, if the score has fallen too: short answers that score better are welcome."""
    score: float = 2.0
    """By so many of its standard deviations from step to step the score then lies below its best."""
    fall: float = 4.0
    """Standard errors by which the check falls below its best, while the reward rises."""
    refused: int = 3
    """Updates refused in a row."""
    check_every: int = 10
    """Steps from one look at the check to the next: the gold judge's mean over them, or a held-out figure."""


class _Reading(NamedTuple):
    """One guard's view of a step."""

    name: str
    value: float
    limit: float
    start: float
    shows: bool
    certain: bool
    since: int
    good_until: int


@dataclass
class _Check:
    """The best the gold judge, or the held-out check, has said so far."""

    mean: float
    error: float
    reward: float
    step: int


@dataclass
class _Memory:
    """All that a guard remembers; plain values."""

    first: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    last: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    squares: dict[str, float] = dataclasses.field(default_factory=dict)
    """Sums of squared differences from step to step."""
    seen: dict[str, int] = dataclasses.field(default_factory=dict)
    best_score: float = -math.inf
    refused: int = 0
    since: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of what shows now: since which step."""
    good_until: dict[str, int] = dataclasses.field(default_factory=dict)
    raised: list[str] = dataclasses.field(default_factory=list)
    """Of what shows now: what was said already."""
    gold: list[float] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    """Both since the last look at the check."""
    best: _Check | None = None
    alarms: list[Alarm] = dataclasses.field(default_factory=list)


class Guard:
    """Watches the figures of a run; its state is plain JSON, so that a resumed run alarms as one left in peace."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._memory = _Memory()

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return list(self._memory.alarms)

    @property
    def needed(self) -> set[int]:
        """For each trouble that may become an alarm: the updates until which all was right."""
        best = [] if self._memory.best is None else [self._memory.best.step - 1]
        return {*self._memory.good_until.values(), *best}

    def check(self, step: int, figures: dict[str, float]) -> list[Alarm]:
        """Read a step's figures; the alarms that are new.

        Args:
            step: counted from 1.
            figures: `kl` (nats an answer), `entropy` (nats a token), `ended` (share), `answer_tokens`, `score`,
                `reward`; `gold`, or `held_out` and its standard error `held_out_error`, where there are; `refused`
                if the update was. What is missing or not finite is passed over.
        """
        memory, new = self._memory, []
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._remember(name, value)
        for reading in self._readings(step, finite):
            if not reading.shows:
                for known in (memory.since, memory.good_until):
                    known.pop(reading.name, None)
                memory.raised = [name for name in memory.raised if name != reading.name]
                continue
            memory.since.setdefault(reading.name, reading.since)
            memory.good_until.setdefault(reading.name, reading.good_until)
            if reading.certain and reading.name not in memory.raised:
                memory.raised.append(reading.name)
                new.append(self._alarm(step, reading, finite))
            elif reading.name == "not_finite" and memory.refused == self._limits.refused:
                new.append(self._alarm(step, reading, finite))
        memory.alarms += new
        return new

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as JSON."""
        state = dataclasses.asdict(self._memory)
        return state | {"best_score": self._memory.best_score if math.isfinite(self._memory.best_score) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        best = None if state["best"] is None else _Check(**state["best"])
        alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        score = -math.inf if state["best_score"] is None else state["best_score"]
        self._memory = _Memory(**state | {"best": best, "alarms": alarms, "best_score": score})

    def _readings(self, step: int, figures: dict[str, float]) -> Iterator[_Reading]:
        """What each guard sees."""
        limits, memory = self._limits, self._memory
        since = max(1, step - WINDOW + 1)  # the median may be late by that much

        def reading(name: str, value: float, limit: float, start: float, shows: bool, certain: bool) -> _Reading:
            return _Reading(name, value, limit, start, shows, certain, since, max(0, since - 2))

        kl = self._now("kl")
        yield reading("kl", kl, limits.kl, self._start("kl"), kl > limits.kl, kl > limits.kl)

        entropy, start = self._now("entropy"), self._start("entropy")
        limit = limits.entropy * start
        yield reading("entropy", entropy, limit, start, entropy < 3 * limit, entropy < limit)

        ended, start = self._now("ended"), self._start("ended")
        fewer = start >= 0.5 and ended < start / 2
        yield reading("length_limit", ended, limits.ended, start, fewer, fewer and ended <= limits.ended)

        length, start = self._now("answer_tokens"), self._start("answer_tokens")
        score = self._now("score")
        memory.best_score = max(memory.best_score, score) if math.isfinite(score) else memory.best_score
        fell = memory.best_score - score >= limits.score * self._deviation("score")
        limit = limits.length * start
        empty = length <= NOTHING and start >= 4 * NOTHING
        yield reading("shrinking", length, limit, start, length < 0.8 * start, (length <= limit and fell) or empty)

        yield from self._refusals(step, figures)
        yield from self._look_at_the_check(step, figures)

    def _refusals(self, step: int, figures: dict[str, float]) -> Iterator[_Reading]:
        memory = self._memory
        memory.refused = memory.refused + 1 if figures.get("refused") else 0
        refused = memory.refused > 0
        # No update was made: the policy is still the one before the first that was refused.
        yield _Reading("not_finite", math.nan, self._limits.refused, 0.0, refused, refused, step, step - 1)

    def _look_at_the_check(self, step: int, figures: dict[str, float]) -> Iterator[_Reading]:
        """The mean since the last look against the best one, by its standard error."""
        memory, limits = self._memory, self._limits
        if "gold" in figures:
            memory.gold.append(figures["gold"])
        if "reward" in figures:
            memory.rewards.append(figures["reward"])
        if step % limits.check_every or not memory.rewards:
            return
        reward = statistics.fmean(memory.rewards)
        now = None
        if len(memory.gold) > 1:
            error = self._deviation("gold") / math.sqrt(len(memory.gold))
            now = _Check(statistics.fmean(memory.gold), error, reward, step)
        elif "held_out" in figures:
            now = _Check(figures["held_out"], figures["held_out_error"], reward, step)
        memory.gold, memory.rewards = [], []
        if now is None:
            return
        best = memory.best
        if best is not None:
            limit = best.mean - limits.fall * math.sqrt(2) * max(best.error, now.error)
            fell = now.mean < limit and reward > best.reward
            yield _Reading(
                "divergence", now.mean, limit, best.mean, fell, fell, best.step + 1, max(0, best.step - 1)
            )
        if best is None or now.mean > best.mean:
            memory.best = now

    def _remember(self, name: str, value: float) -> None:
        memory = self._memory
        if len(memory.first.setdefault(name, [])) < START:
            memory.first[name].append(value)
        last = memory.last.setdefault(name, [])
        if last:
            memory.squares[name] = memory.squares.get(name, 0.0) + (value - last[-1]) ** 2
        memory.seen[name] = memory.seen.get(name, 0) + 1
        memory.last[name] = [*last, value][-WINDOW:]

    def _now(self, name: str) -> float:
        """The median of the last steps; not a number while there are too few."""
        values = self._memory.last.get(name, [])
        return statistics.median(values) if len(values) > WINDOW // 2 else math.nan

    def _start(self, name: str) -> float:
        """The median of the first steps, once they are past."""
        values = self._memory.first.get(name, [])
        return statistics.median(values) if len(values) == START else math.nan

    def _deviation(self, name: str) -> float:
        """Standard deviation of a figure from step to step; of differences, so that a trend hardly shows in it."""
        differences = self._memory.seen.get(name, 0) - 1
        return math.sqrt(self._memory.squares[name] / differences / 2) if differences > 0 else math.nan

    def _alarm(self, step: int, reading: _Reading, figures: dict[str, float]) -> Alarm:
        name, words = reading.name, WORDS[reading.name]
        check = "the gold judge" if "gold" in figures else "the reward on held-out prompts"
        return Alarm(
            name=name,
            step=step,
            since=self._memory.since[name],
            good_until=self._memory.good_until[name],
            value=reading.value if math.isfinite(reading.value) else None,
            limit=reading.limit,
            grave=name != "not_finite" or self._memory.refused >= self._limits.refused,
            what=words.what.format(value=reading.value, limit=reading.limit, start=reading.start, check=check),
            causes=words.causes,
            remedy=words.remedy,
        )


def last_good(good_until: int, steps: Sequence[int]) -> int:
    """Of the steps that have checkpoints, the last that was still right; the first of all if none was."""
    return max((step for step in steps if step <= good_until), default=min(steps))
