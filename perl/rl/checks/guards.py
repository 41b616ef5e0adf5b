"""Guards: they read the metrics of each step and say when training has gone wrong and until when it was good.

A guard reads the median of the last `WINDOW` steps, so that three bad steps of five count and a single one does
not. It has two thresholds: at the first the trouble shows, at the second it is certain and raises an alarm. The
policy was good before the first. Most thresholds are relative to the median of the first `START` steps, because an
entropy that means collapse for one model is normal for another.

A step's metrics describe the policy before that step's update.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perl.measure.change import fixed, places_of
from perl.rl.checks.alarms import WORDS, Alarm
from perl.rl.checks.guard_state import NOTHING, WINDOW, Limits, Memory, Reading, Series, Trouble, Validation
from perl.system.typed_json import as_json, made

AIM = 0.1
"""Intended movement of the policy in a run, nats per token, from which an alarm proposes a learning rate."""
LARGEST_RATE = 1e-2


class Guard:
    """Watches the metrics of a run; a resumed run raises the same alarms as an uninterrupted one.

    Attributes:
        moved_far: whether the KL of the last step has doubled again on its way from a 32nd of its limit. The
            policy is saved then: one that moves fast can pass the limit between two regular checkpoints.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._memory = Memory()
        self.moved_far = False

    @property
    def alarms(self) -> list[Alarm]:
        return list(self._memory.alarms)

    @property
    def needed(self) -> set[int]:
        """The numbers of updates until which all was good, one for each trouble that may become an alarm."""
        best = [] if self._memory.best is None else [self._memory.best.step - 1]
        return {*(trouble.good_until for trouble in self._memory.troubles.values()), *best}

    def check(self, step: int, metrics: dict[str, float]) -> list[Alarm]:
        """Read a step's metrics; return the new alarms.

        Args:
            step: counted from 1.
            metrics: `kl` (nats per completion), `entropy`, `sampler_mismatch` (nats per token), `ended` (share),
                `answer_tokens`, `reward`, `score`; `gold`, or `held_out` and its standard error `held_out_error`,
                if available; `movement_at_the_end` (nats per token) if it was measured; `refused` if the update
                was refused, `no_signal` if there was no update to make. Missing and non-finite values are skipped.
        """
        memory, new = self._memory, []
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for name, value in finite.items():
            memory.metrics.setdefault(name, Series()).add(value)
        doublings = self._kl_doublings()
        self.moved_far, memory.doublings = doublings > memory.doublings, max(doublings, memory.doublings)
        for reading in self._readings(step, finite):
            if not reading.shows:
                memory.troubles.pop(reading.name, None)
                continue
            trouble = memory.troubles.setdefault(reading.name, Trouble(reading.since, reading.good_until))
            if reading.name == "no_signal":  # no update was made, so the newest policy is good
                trouble.good_until = step
            if reading.certain and (trouble.grave is None or (reading.grave and not trouble.grave)):
                trouble.grave = reading.grave
                new.append(self._alarm(step, reading, trouble, "gold" in finite))
        memory.alarms += new
        return new

    def state_dict(self) -> dict[str, object]:
        state: dict[str, object] = as_json(self._memory)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory = made(Memory, state)

    def _series(self, name: str) -> Series:
        return self._memory.metrics.get(name, Series())

    def _kl_doublings(self) -> int:
        share = (self._series("kl").last or [0.0])[-1] / self._limits.kl
        return math.floor(math.log2(32 * share)) + 1 if share >= 1 / 32 else 0

    def _readings(self, step: int, metrics: dict[str, float]) -> Iterator[Reading]:
        since = max(1, step - WINDOW + 1)  # the median may lag by that much
        for reading in self._of_medians():
            yield reading._replace(since=since, good_until=max(0, since - 2))
        for reading in self._of_this_step(metrics):
            yield reading._replace(since=step, good_until=step - 1)
        yield from self._of_validation(step, metrics)

    def _of_medians(self) -> Iterator[Reading]:
        limits, memory = self._limits, self._memory
        kl, reward, score = self._series("kl"), self._series("reward"), self._series("score")
        too_far = kl.now > limits.kl
        yield Reading("kl", kl.now, limits.kl, kl.start, too_far, too_far)

        entropy, risen = self._series("entropy"), reward.now > reward.start + reward.deviation
        now, limit = entropy.now, limits.entropy * entropy.start
        # A weak base is unsure of everything: becoming sure of what scores better is learning.
        sure = risen and now > limits.entropy_nats
        yield Reading("entropy", now, limit, entropy.start, now < 1.5 * limit, now < limit, not sure)

        limit = max(limits.entropy_rise * entropy.start, entropy.start + limits.entropy_rise_nats)
        more = not risen and now > (entropy.start + limit) / 2
        yield Reading("entropy_rising", now, limit, entropy.start, more, more and now > limit)

        ended = self._series("ended")
        fewer = ended.start >= 0.5 and ended.now < ended.start / 2
        # A story need not end: if the score rises nevertheless, this only warns.
        better = score.now > score.start + score.deviation
        certain = fewer and ended.now <= limits.ended
        yield Reading("length_limit", ended.now, limits.ended, ended.start, fewer, certain, not better)

        length = self._series("answer_tokens")
        if math.isfinite(reward.now):
            memory.best_reward = max(reward.now, memory.best_reward)
        best = memory.best_reward
        fell = best - reward.now >= max(limits.reward * reward.deviation, (best - reward.start) / 2)
        now, limit = length.now, limits.length * length.start
        certain = (now <= limit and fell) or (now <= NOTHING and length.start >= 4 * NOTHING)
        yield Reading("shrinking", now, limit, length.start, now < 0.8 * length.start, certain)

        mismatch = self._series("sampler_mismatch")
        now, start = mismatch.now, mismatch.first[0] if mismatch.first else math.nan
        limit = max(limits.mismatch, limits.mismatch_rise * start)
        yield Reading("sampler_mismatch", now, limit, start, now > limit / 2, now > limit)

    def _of_this_step(self, metrics: dict[str, float]) -> Iterator[Reading]:
        memory, limits = self._memory, self._limits
        if (moves := metrics.get("movement_at_the_end")) is not None:
            still = moves < limits.movement
            yield Reading("nothing_learned", moves, limits.movement, 0.0, still, still, moves < limits.no_movement)
        memory.refused = memory.refused + 1 if metrics.get("refused") else 0
        refused, grave = memory.refused > 0, memory.refused >= limits.refused
        yield Reading("not_finite", math.nan, limits.refused, 0.0, refused, refused, grave)
        flat = memory.flat = memory.flat + 1 if metrics.get("no_signal") else 0
        yield Reading(
            "no_signal", flat, limits.flat, 0.0, flat > 0, flat >= limits.flat, flat >= limits.flat_for_good
        )

    def _of_validation(self, step: int, metrics: dict[str, float]) -> Iterator[Reading]:
        """Compare the validation score with the best one so far, by its standard error."""
        memory, limits = self._memory, self._limits
        memory.gold += [metrics["gold"]] if "gold" in metrics else []
        memory.rewards += [metrics["reward"]] if "reward" in metrics else []
        if step % limits.check_every or not memory.rewards:
            return
        gold, rewards, best = memory.gold, memory.rewards, memory.best
        memory.gold, memory.rewards = [], []
        if len(gold) > 1:
            mean, error = statistics.fmean(gold), self._series("gold").deviation / math.sqrt(len(gold))
        elif "held_out" in metrics:
            mean, error = metrics["held_out"], metrics["held_out_error"]
        else:
            return
        now = Validation(mean, error, statistics.fmean(rewards), step)
        if best is not None:
            limit = best.mean - limits.fall * math.sqrt(2) * max(best.error, error)
            fell = mean < limit and now.reward > best.reward
            since = best.step + 1
            yield Reading("divergence", mean, limit, best.mean, fell, fell, since=since, good_until=since - 2)
        if best is None or mean > best.mean:
            memory.best = now

    def _alarm(self, step: int, reading: Reading, trouble: Trouble, judged: bool) -> Alarm:
        name, value, words = reading.name, reading.value, WORDS[reading.name]
        ended = self._series("ended")
        if name == "shrinking" and self._limits.penalized and ended.now >= ended.start + 0.1:
            words = WORDS["shrinking_by_penalty"]
        elif name == "shrinking" and not self._limits.kl_term:
            words = WORDS["shrinking_without_kl"]
        key, better = self._limits.step_key, self._better_step_size(value)
        length = self._series("answer_tokens")
        check = "the gold judge" if judged else "the reward on held-out prompts"
        places = max(2, places_of(abs(reading.start - value)))  # rewards may be of any scale
        return Alarm(
            name=name,
            step=step,
            since=trouble.since,
            good_until=trouble.good_until,
            value=value if math.isfinite(value) else None,
            limit=reading.limit,
            grave=reading.grave,
            what=words.what.format(
                value=value,
                limit=reading.limit,
                start=reading.start,
                check=check,
                length=length,
                ends=f"{fixed(reading.start, places)} to {fixed(value, places)}",
            ),
            causes=words.causes.format(step=key.replace("_", " ")),
            remedy=words.remedy.format(better=better, hold=self._limits.hold, step_key=key),
        )

    def _better_step_size(self, movement: float) -> str:
        """Return the value of the step's key with which the policy would move by `AIM` nats per token."""
        natural = self._limits.step_key == "trust_region"  # a KL, which grows with the square of the movement
        if movement <= 0:
            return f"{LARGEST_RATE:g}" if natural else "auto"
        return f"{min(LARGEST_RATE, self._limits.step_size * (AIM / movement) ** (2 if natural else 1)):.1g}"


def last_good(good_until: int, steps: Sequence[int]) -> int:
    """Return the last checkpointed step that was still good, or the first of all if none was."""
    return max((step for step in steps if step <= good_until), default=min(steps))
