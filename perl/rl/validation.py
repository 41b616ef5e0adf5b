"""Validation of the policy every few steps, so that the best one is kept instead of the last."""

import statistics
from dataclasses import dataclass

from perl.data.records import Judge
from perl.rl.collector import Collector
from perl.rl.evaluate import evaluate_policy
from perl.rl.rollout import EncodedPrompts
from perl.roles.role import Role
from perl.runs.validation import Validation


@dataclass(frozen=True)
class PolicyValidation:
    """Validation of the policy, always with the same random numbers.

    Attributes:
        collector: the collector with the validating reward.
        judge: the gold judge, if it is the one that chooses.
        kl_weight: cost of one nat of KL to the reference, in standard deviations of the reward; 0 if the
            validating reward is not the one that is trained on.
        found: the results so far.
    """

    collector: Collector
    prompts: EncodedPrompts
    judge: Judge | None
    kl_weight: float
    found: Validation

    def check(self, step: int, steps: int, reward_std: float) -> dict[str, float]:
        """Validate after a step, if validation is due, and return the value as a metric.

        Args:
            reward_std: current standard deviation of the training reward.
        """
        if not self.found.due(step, steps):
            return {}
        metrics = evaluate_policy(self.collector, Role.POLICY, self.prompts, self.judge)
        worth = statistics.fmean(metrics["reward" if self.judge is None else "gold"])
        if not self.found.unit:  # 0 until rewards have differed
            self.found.unit = reward_std  # kept, so that all steps are comparable
        worth -= self.kl_weight * self.found.unit * statistics.fmean(metrics["kl"])
        self.found.values[step] = worth
        return {"validation": worth}
