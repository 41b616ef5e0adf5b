"""The validation score that the guards of RL read in addition to the rollouts, and the effects of their alarms.

A run that a guard stopped has not failed: its last good policy is evaluated and saved like any other, and the exit
status is 0. Console, report and page say that it was stopped.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

from perl.results import Incident
from perl.rl.checks.alarms import Alarm
from perl.rl.checks.guard_state import WINDOW, Limits
from perl.rl.checks.guards import Guard, last_good
from perl.rl.collector import Collector
from perl.rl.rollout import EncodedPrompts
from perl.roles.role import Role
from perl.system.progress import console

Mode = Literal["stop", "warn", "off"]
"""Effect of an alarm; off: nothing is read."""
VALIDATIONS = 10
"""Validations per run."""
FEWEST_STEPS = 10
"""Smallest number of steps between validations, even in short runs."""
FEWEST, MOST = 8, 64
"""Held-out prompts of a validation; fewer than the minimum would show nothing."""


def validation_interval(steps: int) -> int:
    """Return the number of steps between validations in a run of `steps` steps."""
    return max(FEWEST_STEPS, -(-steps // VALIDATIONS))


class Guarding:
    """The guard of one run.

    Args:
        prompts: held-out prompts, completed at each validation.
        judged: whether a gold judge scores every rollout, which makes validations unnecessary.
    """

    def __init__(
        self, collector: Collector, prompts: EncodedPrompts, mode: Mode, limits: Limits, *, judged: bool
    ) -> None:
        self.guard = Guard(limits)
        self._collector, self._prompts, self._mode = collector, prompts, mode
        self._every = None if judged or mode == "off" or len(prompts) < FEWEST else limits.check_every

    def check(self, step: int) -> dict[str, float]:
        """Measure, every few steps, the reward of completions of held-out prompts, sampled with a fixed seed.

        It cannot show that the reward is wrong, only that what was learned on training prompts fails on others.
        """
        if self._every is None or step % self._every:
            return {}
        collector, prompts = self._collector, self._prompts
        local = collector.collect(Role.POLICY, prompts, collector.generator("check"))
        rewards = local.gather(collector.processes, prompts).rewards_B.tolist()
        error = statistics.stdev(rewards) / len(rewards) ** 0.5
        return {"held_out": statistics.fmean(rewards), "held_out_error": error}

    def alarms(self, step: int, metrics: dict[str, float]) -> list[Alarm]:
        """Read a step's metrics and print new alarms; return those that stop the run."""
        if self._mode == "off":
            return []
        new = self.guard.check(step, metrics)
        for alarm in new:
            console.print(f"[yellow]Step {alarm.step}[/]: {alarm.what}. {alarm.causes} {alarm.remedy}")
        return [alarm for alarm in new if alarm.grave and self._mode == "stop"]

    def worth_keeping(self, step: int, steps: Sequence[int]) -> set[int]:
        """Return the checkpointed steps to which the run may have to return.

        Args:
            step: the step that is checkpointed now; trouble that shows next may have begun a window earlier.
        """
        begun = max(0, step - WINDOW)
        later = {one for one in steps if one > begun}
        return later | {last_good(good_until, steps) for good_until in {*self.guard.needed, begun} if steps}

    def incidents(self, stopped_by: Sequence[Alarm], remains: int) -> list[Incident]:
        """Return all alarms for the report.

        Args:
            stopped_by: the alarms that ended the run.
            remains: number of updates of the policy that is kept.
        """
        return [
            Incident(**vars(alarm), action="stopped", remains=remains)
            if alarm in stopped_by
            else Incident(**vars(alarm), action="warned")
            for alarm in self.guard.alarms
        ]
