"""Compares RL with a baseline trained on the same ratings, on the same held-out prompts at the same KL.

Both are evaluated at their common starting policy (KL 0), at a few intermediate policies (for RL, its checkpoints
on disk), and at their last policy. They are compared at the largest KL that both reached,

    K    = min over both of max over their policies i of k_i
    m(K) = (1 - w) m_{i-1} + w m_i,   w = (K - k_{i-1}) / (k_i - k_{i-1}),   i the first with k_i ≥ K

for each prompt and metric m. These are the metrics of a mixture of the two policies around K that samples from the
second one with probability w; its KL is at most K (KL is convex). Intervals are over prompts, at these w.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from perl.baselines.results import BaselineResult, Reached
from perl.baselines.training import BASELINES, train_baseline
from perl.data.records import Judge
from perl.errors import UserError
from perl.measure.paired import Metrics
from perl.measure.two_runs import compare_metrics
from perl.rl.collector import Collector
from perl.rl.evaluate import PART, PASS, evaluate_policy
from perl.rl.rollout import EncodedPrompts
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.runs import snapshot
from perl.stages.rl_setup import eval_prompts, setup_collector
from perl.stages.session import Session
from perl.system.seeds import seed_everything


@dataclass(frozen=True)
class Point:
    """A policy after a number of steps: metrics of each held-out prompt."""

    step: int
    metrics: Metrics

    @property
    def kl(self) -> float:
        return statistics.fmean(self.metrics["kl"])


class Judging:
    """Evaluates all policies of a finished run in the same way: with RL's own sampler, reward and prompts."""

    def __init__(self, session: Session) -> None:
        assert isinstance(session.roles, SharedBase)
        self.session, self.roles = session, session.roles
        self._prompts: EncodedPrompts = eval_prompts(session)
        self._judge: Judge | None = session.held_out.judge
        self._collector = self._reloaded_collector()
        self._start = self._reference()
        self._rl = self._of_rl()

    def _reloaded_collector(self) -> Collector:
        """Load all roles except the policy again."""
        self.roles.clear()
        seed_everything(self.session.recipe.seed)
        self.session.load_reference()
        return setup_collector(self.session)

    def _point(self, step: int, role: Role = Role.POLICY) -> Point:
        self._collector.sampler.sync(role)
        found = evaluate_policy(self._collector, role, self._prompts, self._judge)
        return Point(step, {name: of for name, of in found.items() if not name.startswith((PART, PASS))})

    def _reference(self) -> Point:
        found = self._point(0, self.roles.reference)
        zero = [0.0] * len(self._prompts)  # the reference's KL to itself, without rounding errors
        return Point(0, {**found.metrics, "kl": zero})

    def _of_rl(self) -> list[Point]:
        """Evaluate the policy that both start from, those in RL's checkpoints, and RL's final policy."""
        session, result = self.session, self.session.folder.results().rl
        assert result is not None
        checkpoints, last = session.checkpoints(Role.POLICY), result.eval.steps
        session.load(Role.POLICY)
        final, found = self._point(last), [self._start]
        for step in checkpoints.steps():
            if 0 < step < last:
                tensors = checkpoints.read(step).tensors
                snapshot.load_trained_state(self.roles, [Role.POLICY], tensors, str(checkpoints.folder))
                found.append(self._point(step))
        return [*found, final]

    def baseline(self, name: str, rate: float, belongs: str) -> BaselineResult:
        """Train a baseline from RL's starting policy, and compare it with RL.

        Args:
            belongs: identifies what the comparison was made from.
        """
        self._collector = self._reloaded_collector()
        self.roles.add(Role.POLICY, copy_of=self.roles.reference)
        self.roles.eval()  # new adapters start with dropout on
        found = [self._start]
        trained = train_baseline(self.session, name, rate, lambda step: found.append(self._point(step)))
        kl = min(max(one.kl for one in curve) for curve in (found, self._rl))
        dialogues = [prompt.dialogue for prompt in self._prompts.prompts]
        return BaselineResult(
            method=name,
            seed=self.session.recipe.seed,
            learning_rate=rate,
            rows=trained.rows,
            learns_from=BASELINES[name].learns_from,
            steps=trained.steps,
            seconds=trained.cost.seconds,
            peak_memory_bytes=trained.cost.peak_memory_bytes,
            policies=[reached(one) for one in found],
            rl_policies=[reached(one) for one in self._rl],
            kl=kl,
            matched=compare_metrics(at_kl(found, kl), at_kl(self._rl, kl), dialogues),
            belongs=belongs,
        )


def reached(point: Point) -> Reached:
    """Return the means of a policy's metrics."""
    gold = point.metrics.get("gold")
    reward = statistics.fmean(point.metrics["reward"])
    return Reached(point.step, point.kl, reward, None if gold is None else statistics.fmean(gold))


def at_kl(policies: Sequence[Point], kl: float) -> Metrics:
    """Return each prompt's metrics, interpolated to where a KL is first reached; one policy must reach it."""
    index = next(number for number, one in enumerate(policies) if one.kl >= kl)
    after = policies[index]
    if index == 0:
        return after.metrics
    before = policies[index - 1]
    share = (kl - before.kl) / (after.kl - before.kl)
    return {
        name: [(1 - share) * a + share * b for a, b in zip(before.metrics[name], values, strict=True)]
        for name, values in after.metrics.items()
    }


def check_baselines(session: Session, names: Sequence[str]) -> None:
    """Refuse what the baselines cannot use, before RL is run.

    Raises:
        UserError: TRL's trainers do not support the base, or there are no suitable ratings.
    """
    assert session.recipe.reward is not None
    if session.roles.backbone.encodes_prompts:
        what, remedy = "TRL's trainers for preferences only support decoders", "Remove --baselines."
        raise UserError(what, where=f"base.model {session.base.name}", remedy=remedy)
    for name in names:
        BASELINES[name].rows(session, session.train, session.recipe.reward.batch_size)
