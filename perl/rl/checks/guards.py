"""Guards: they read the metrics of each step, and say when training has gone wrong and until when it was right.

A guard reads the median of the last `WINDOW` steps, so that three bad steps of five count and a single one does
not. Two marks make an alarm: at the first the trouble begins to show, at the second it is certain. What was right
is what came before the first. Most marks are shares of what the first `START` steps showed, because a tenth of a
nat of entropy is collapse to one model and daily life to another.

A step's metrics are of the policy before that step's update.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from perl.rl.checks.alarms import WORDS, Alarm
from perl.rl.checks.guard_state import NOTHING, START, WINDOW, Check, Limits, Memory, Reading

AIM = 0.1
"""Nats a token that a policy should move by in a run, for the learning rate that an alarm proposes."""
LARGEST_RATE = 1e-2


class Guard:
    """Watches the metrics of a run; its state is plain JSON, so that a resumed run alarms as one left in peace."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._memory = Memory()

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return list(self._memory.alarms)

    @property
    def needed(self) -> set[int]:
        """For each trouble that may become an alarm: the updates until which all was right."""
        best = [] if self._memory.best is None else [self._memory.best.step - 1]
        return {*self._memory.good_until.values(), *best}

    def check(self, step: int, metrics: dict[str, float]) -> list[Alarm]:
        """Read a step's metrics; the alarms that are new.

        Args:
            step: counted from 1.
            metrics: `kl` (nats a completion), `entropy` and `sampler_mismatch` (nats a token), `ended` (share),
                `answer_tokens`, `reward`; `gold`, or `held_out` and its standard error `held_out_error`, where
                there are; `movement_at_the_end` (nats a token) where it was measured; `refused` if the update was,
                `no_signal` if there was none to make. What is missing or not finite is passed over.
        """
        memory, new = self._memory, []
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._remember(name, value)
        for reading in self._readings(step, finite):
            if not reading.shows:
                for known in (memory.since, memory.good_until):
                    known.pop(reading.name, None)
                memory.raised = [name for name in memory.raised if name != reading.name]
                memory.grave = [name for name in memory.grave if name != reading.name]
                continue
            memory.since.setdefault(reading.name, reading.since)
            memory.good_until.setdefault(reading.name, reading.good_until)
            worse = reading.grave and reading.name not in memory.grave
            if reading.certain and (reading.name not in memory.raised or worse):
                memory.raised.append(reading.name)
                memory.grave += [reading.name] if reading.grave else []
                new.append(self._alarm(step, reading, finite))
        memory.alarms += new
        return new

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as JSON."""
        state = dataclasses.asdict(self._memory)
        return state | {
            "best_reward": self._memory.best_reward if math.isfinite(self._memory.best_reward) else None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        best = None if state["best"] is None else Check(**state["best"])
        alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        score = -math.inf if state["best_reward"] is None else state["best_reward"]
        self._memory = Memory(**state | {"best": best, "alarms": alarms, "best_reward": score})

    def _readings(self, step: int, metrics: dict[str, float]) -> Iterator[Reading]:
        """What each guard sees."""
        limits, memory = self._limits, self._memory
        since = max(1, step - WINDOW + 1)  # the median may be late by that much

        def reading(
            name: str, value: float, limit: float, start: float, shows: bool, certain: bool, grave: bool = True
        ) -> Reading:
            return Reading(name, value, limit, start, shows, certain, since, max(0, since - 2), grave)

        kl = self._now("kl")
        yield reading("kl", kl, limits.kl, self._start("kl"), kl > limits.kl, kl > limits.kl)

        reward, reward_start = self._now("reward"), self._start("reward")
        risen = reward > reward_start + self._deviation("reward")

        entropy, start = self._now("entropy"), self._start("entropy")
        limit = limits.entropy * start
        # A base that knew little was unsure of everything: to become sure of what scores better is to learn.
        sure = risen and entropy > limits.entropy_nats
        yield reading("entropy", entropy, limit, start, entropy < 1.5 * limit, entropy < limit, not sure)

        limit = max(limits.entropy_rise * start, start + limits.entropy_rise_nats)
        more = not risen and entropy > (start + limit) / 2
        yield reading("entropy_rising", entropy, limit, start, more, more and entropy > limit)

        ended, ended_start = self._now("ended"), self._start("ended")
        fewer = ended_start >= 0.5 and ended < ended_start / 2
        certain = fewer and ended <= limits.ended
        # Where the score rises all the same, missing ends and all, it is said and goes on: a story need not end.
        better = self._now("score") > self._start("score") + self._deviation("score")
        yield reading("length_limit", ended, limits.ended, ended_start, fewer, certain, not better)

        length, start = self._now("answer_tokens"), self._start("answer_tokens")
        memory.best_reward = max(memory.best_reward, reward) if math.isfinite(reward) else memory.best_reward
        lost, gained = memory.best_reward - reward, memory.best_reward - reward_start
        fell = lost >= max(limits.reward * self._deviation("reward"), gained / 2)
        limit = limits.length * start
        empty = length <= NOTHING and start >= 4 * NOTHING
        yield reading("shrinking", length, limit, start, length < 0.8 * start, (length <= limit and fell) or empty)

        mismatch, start = self._now("sampler_mismatch"), memory.first.get("sampler_mismatch", [math.nan])[0]
        limit = max(limits.mismatch, limits.mismatch_rise * start)
        yield reading("sampler_mismatch", mismatch, limit, start, mismatch > limit / 2, mismatch > limit)

        yield from self._nothing_learned(step, metrics)
        yield from self._refusals(step, metrics)
        yield from self._flat_rewards(step, metrics)
        yield from self._look_at_the_check(step, metrics)

    def _nothing_learned(self, step: int, metrics: dict[str, float]) -> Iterator[Reading]:
        moves = metrics.get("movement_at_the_end")
        if moves is not None:
            limits = self._limits
            still, grave = moves < limits.movement, moves < limits.no_movement
            yield Reading("nothing_learned", moves, limits.movement, 0.0, still, still, step, step - 1, grave)

    def _refusals(self, step: int, metrics: dict[str, float]) -> Iterator[Reading]:
        memory = self._memory
        memory.refused = memory.refused + 1 if metrics.get("refused") else 0
        refused, grave = memory.refused > 0, memory.refused >= self._limits.refused
        # No update was made: the policy is still the one before the first that was refused.
        yield Reading("not_finite", math.nan, self._limits.refused, 0.0, refused, refused, step, step - 1, grave)

    def _flat_rewards(self, step: int, metrics: dict[str, float]) -> Iterator[Reading]:
        memory, limits = self._memory, self._limits
        memory.flat = memory.flat + 1 if metrics.get("no_signal") else 0
        flat, grave = memory.flat >= limits.flat, memory.flat >= limits.flat_for_good
        yield Reading("no_signal", memory.flat, limits.flat, 0.0, memory.flat > 0, flat, step, step - 1, grave)

    def _look_at_the_check(self, step: int, metrics: dict[str, float]) -> Iterator[Reading]:
        """The mean since the last look against the best one, by its standard error."""
        memory, limits = self._memory, self._limits
        if "gold" in metrics:
            memory.gold.append(metrics["gold"])
        if "reward" in metrics:
            memory.rewards.append(metrics["reward"])
        if step % limits.check_every or not memory.rewards:
            return
        reward = statistics.fmean(memory.rewards)
        now = None
        if len(memory.gold) > 1:
            error = self._deviation("gold") / math.sqrt(len(memory.gold))
            now = Check(statistics.fmean(memory.gold), error, reward, step)
        elif "held_out" in metrics:
            now = Check(metrics["held_out"], metrics["held_out_error"], reward, step)
        memory.gold, memory.rewards = [], []
        if now is None:
            return
        best = memory.best
        if best is not None:
            limit = best.mean - limits.fall * math.sqrt(2) * max(best.error, now.error)
            fell = now.mean < limit and reward > best.reward
            yield Reading(
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

    def _alarm(self, step: int, reading: Reading, metrics: dict[str, float]) -> Alarm:
        name, words = reading.name, WORDS[self._words(reading)]
        check = "the gold judge" if "gold" in metrics else "the reward on held-out prompts"
        return Alarm(
            name=name,
            step=step,
            since=self._memory.since[name],
            good_until=self._memory.good_until[name],
            value=reading.value if math.isfinite(reading.value) else None,
            limit=reading.limit,
            grave=reading.grave,
            what=words.what.format(value=reading.value, limit=reading.limit, start=reading.start, check=check),
            causes=words.causes,
            remedy=words.remedy.format(rate=self._better_rate(reading.value)),
        )

    def _words(self, reading: Reading) -> str:
        """What the alarm is written under in `WORDS`: its name, or a more special cause."""
        more_end = self._now("ended") >= self._start("ended") + 0.1
        by_penalty = reading.name == "shrinking" and self._limits.penalized and more_end
        return "shrinking_by_penalty" if by_penalty else reading.name

    def _better_rate(self, moves: float) -> str:
        """The learning rate that would move the policy by `AIM`, if this one moves it by so much."""
        if not moves > 0:
            return "auto"
        return f"{min(LARGEST_RATE, self._limits.learning_rate * AIM / moves):.1g}"


def last_good(good_until: int, steps: Sequence[int]) -> int:
    """Of the steps that have checkpoints, the last that was still right; the first of all if none was."""
    return max((step for step in steps if step <= good_until), default=min(steps))
