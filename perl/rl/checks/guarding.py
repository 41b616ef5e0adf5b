"""The validation score that the guards of RL read besides the rollouts, and what their alarms lead to.

A run that a guard stopped has not failed: its last good policy is evaluated and saved as any other, and the exit
status is 0. Console, report and page say that it was stopped.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

from perl.results import Incident
from perl.rl.checks.alarms import Alarm
from perl.rl.checks.findings import CLOSE_LOG_PROBS
from perl.rl.checks.guard_state import WINDOW, Limits
from perl.rl.checks.guards import Guard, last_good
from perl.rl.collector import Collector
from perl.rl.rollout import EncodedPrompts
from perl.roles.roles import Role
from perl.system.progress import console

Mode = Literal["stop", "warn", "off"]
"""What an alarm leads to; off: nothing is read."""
CHECKS = 10
"""Validation scores of a run."""
FEWEST_STEPS = 10
"""From one to the next, however short the run."""
FEWEST, MOST = 8, 64
"""Held-out prompts of a validation; fewer would say nothing."""


class Guarding:
    """The guard of one run.

    Args:
        held_out: prompts, of which as many as `prompts_per_step` are completed at each validation, within bounds.
        steps: of the run.
        judged: whether a gold judge is asked about every rollout.
        learning_rate: the full one, of adapters or whole models.
        penalized: whether completions without an end are.
    """

    def __init__(
        self,
        collector: Collector,
        held_out: EncodedPrompts,
        mode: Mode,
        *,
        prompts_per_step: int,
        steps: int,
        kl_limit: float,
        judged: bool,
        learning_rate: float,
        penalized: bool,
    ) -> None:
        self.mode, self._collector, self._judged = mode, collector, judged
        self._prompts = held_out.take(range(min(len(held_out), MOST, max(FEWEST, prompts_per_step))))
        self._check_every = max(FEWEST_STEPS, -(-steps // CHECKS))
        limits = Limits(
            kl=kl_limit,
            check_every=self._check_every,
            penalized=penalized,
            mismatch=CLOSE_LOG_PROBS[collector.dtype],
            learning_rate=learning_rate,
        )
        self.guard = Guard(limits)

    def check(self, step: int) -> dict[str, float]:
        """Every few steps, the reward of the policy's completions of held-out prompts, always drawn alike.

        For sources without a gold judge, which would be asked about every rollout at no cost. It cannot show that
        the reward itself is wrong, only that what was learned on the training prompts fails on others.
        """
        if self.mode == "off" or self._judged or step % self._check_every or len(self._prompts) < FEWEST:
            return {}
        collector, prompts = self._collector, self._prompts
        local = collector.collect(Role.POLICY, prompts, collector.generator("check"))
        rewards = local.gather(collector.processes, prompts).rewards_B.tolist()
        error = statistics.stdev(rewards) / len(rewards) ** 0.5
        return {"held_out": statistics.fmean(rewards), "held_out_error": error}

    def alarms(self, step: int, metrics: dict[str, float]) -> list[Alarm]:
        """Read a step's metrics and print new alarms; return those for which the run is to stop."""
        if self.mode == "off":
            return []
        new = self.guard.check(step, metrics)
        for alarm in new:
            console.print(f"[yellow]Step {alarm.step}[/]: {alarm.what}. {alarm.causes} {alarm.remedy}")
        return [alarm for alarm in new if alarm.grave and self.mode == "stop"]

    def worth_keeping(self, step: int, steps: Sequence[int]) -> set[int]:
        """Of the steps that have checkpoints, those that the run may have to go back to.

        Args:
            step: the one that is checkpointed now: trouble that shows next may have begun a window before.
        """
        needed = {*self.guard.needed, max(0, step - WINDOW)}
        return {last_good(good_until, steps) for good_until in needed} if steps else set()

    def incidents(self, stopped_by: Sequence[Alarm], remains: int) -> list[Incident]:
        """All alarms for the report.

        Args:
            stopped_by: the alarms that ended the run.
            remains: updates that the remaining policy has seen.
        """
        return [
            Incident(**vars(alarm), action="stopped", remains=remains)
            if alarm in stopped_by
            else Incident(**vars(alarm), action="warned")
            for alarm in self.guard.alarms
        ]
