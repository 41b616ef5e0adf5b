"""The policy judged on validation prompts every few steps, to keep the best one and not the last."""

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
    """Who judges the policy, on what; always with the same draws.

    Attributes:
        collector: with the reward that judges.
        judge: the gold judge, where it is the one that chooses.
        kl_weight: what a nat of KL to the reference costs, in standard deviations of the reward; 0 where another
            reward judges than the one that is trained on.
        found: what it came to.
    """

    collector: Collector
    prompts: EncodedPrompts
    judge: Judge | None
    kl_weight: float
    found: Validation

    def check(self, step: int, steps: int, reward_std: float) -> dict[str, float]:
        """The validation after a step, if one is due, as a metric.

        Args:
            reward_std: a standard deviation of the reward, as training sees it now.
        """
        if not self.found.due(step, steps):
            return {}
        metrics = evaluate_policy(self.collector, Role.POLICY, self.prompts, self.judge)
        worth = statistics.fmean(metrics["reward" if self.judge is None else "gold"])
        if not self.found.unit:  # one for all, or steps could not be compared; 0 before rewards have differed
            self.found.unit = reward_std
        worth -= self.kl_weight * self.found.unit * statistics.fmean(metrics["kl"])
        self.found.values[step] = worth
        return {"validation": worth}
