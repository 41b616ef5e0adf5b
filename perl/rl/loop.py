"""The loop of RL: sample, score, estimate, update.

All randomness of a step is derived from the seed and the step number. The whole state of the loop is therefore
the step, the adapters and heads, the optimizer, the reward scale, β, and the state of the guards and of the
prompt choice.

Axis letters: B completions, T completion positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from perl.data.records import Judge
from perl.measure.meter import Meter
from perl.results import Check
from perl.rl.algorithm import Algorithm, Targets
from perl.rl.checks.alarms import Alarm
from perl.rl.checks.guarding import Guarding
from perl.rl.checks.guards import last_good
from perl.rl.checks.liveness import Liveness
from perl.rl.checks.preflight import Preflight
from perl.rl.collector import Collector
from perl.rl.dynamic_sampling import assembled, differing
from perl.rl.evaluate import describe
from perl.rl.maths import adapted_kl_coef, importance_weights
from perl.rl.objective import Objective
from perl.rl.prompt_choice import PromptChoice
from perl.rl.rewards.scale import RewardScale
from perl.rl.rollout import EncodedPrompts, Rollout
from perl.rl.update import Learner
from perl.rl.validation import PolicyValidation
from perl.roles.role import Role
from perl.runs import snapshot
from perl.runs.checkpoint import Checkpoints
from perl.system.interrupt import between_steps
from perl.system.progress import track
from perl.system.typed_json import as_json, made

LARGEST_WEIGHT = 2.0
"""Upper bound of a token's importance weight, π_old over the probability that the sampler gave it."""


@dataclass(frozen=True)
class InitialEval:
    """Results from before the first step; stored in the checkpoints because they are expensive to compute."""

    preflight: list[Check]
    before: dict[str, list[float]]
    """Evaluation of the reference on the held-out prompts, as returned by `evaluate_policy`."""


@dataclass
class Loop:
    """The components of RL training and their current state."""

    collector: Collector
    learner: Learner
    objective: Objective
    prompts: EncodedPrompts
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    judge: Judge | None
    """Judge of the training completions; its verdicts are logged and never trained on."""
    preflight: Preflight
    liveness: Liveness
    guarding: Guarding
    meter: Meter
    checkpoints: Checkpoints
    reward_scale: RewardScale
    prompt_choice: PromptChoice
    kl_coef: float
    """Current β of `(1-β) r - β KL`."""
    validation: PolicyValidation | None = None
    """Chooses the policy that is kept; None: the last one is kept."""

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm's row of the table."""
        return self.learner.algorithm

    def completed(self, chosen: Sequence[int]) -> EncodedPrompts:
        """Return these prompts, each repeated once per completion."""
        return self.prompts.take(chosen).repeat(self.samples_per_prompt)


def train(
    loop: Loop, initial: InitialEval, done: int, log: Callable[[int, dict[str, float], dict[str, str]], None]
) -> list[Alarm]:
    """Take the remaining steps; return the alarms that ended training early, if any.

    Args:
        done: number of steps taken by earlier processes.
        log: called after each step with its number, counted from 1, its metrics, and the versions of the
            weights that sampled and scored, where a server holds them.

    Raises:
        KeyboardInterrupt: a stop was requested; the last step is saved.
        PreflightError: the first updates did not have the expected effect.
    """
    validation = None if loop.validation is None else loop.validation.found
    stopped_by: list[Alarm] = []
    with track("rl", loop.steps, done) as bar, between_steps(loop.collector.processes) as stop:
        for step in range(done, loop.steps):
            if validation is not None and validation.exhausted:
                break
            metrics, served = take_step(loop, step)
            log(step + 1, metrics, served)
            bar(reward=metrics["reward"], kl=metrics["kl"])
            if stopped_by := loop.guarding.alarms(step + 1, metrics):
                break
            best = validation is not None and validation.best() == step + 1
            last = stop.poll() or step + 1 == loop.steps or (validation is not None and validation.exhausted)
            if loop.guarding.guard.moved_far or last or best or loop.checkpoints.due(step + 1):
                checkpoint(loop, step + 1, initial)
            if stop.requested:
                raise KeyboardInterrupt
        # Again: an alarm skips the poll, and a resumed run has the same one; otherwise it was before a checkpoint.
        if stop.poll():
            raise KeyboardInterrupt
    return stopped_by


def take_step(loop: Loop, step: int) -> tuple[dict[str, float], dict[str, str]]:
    """Take one step; return its metrics, and the versions of the weights that a server sampled and scored with."""
    with loop.meter.step(loop.learner.optimizer):
        local, rollout, drawn = collect_step(loop, step)
        normalized_B = loop.objective.normalized(step, rollout, loop.reward_scale)
        begin_next(loop, step + 1)
        learned = {"no_signal": 1.0}
        if loop.algorithm.has_signal(rollout, normalized_B):
            targets = estimate(loop, rollout, normalized_B)
            learned = loop.liveness.watch(step, rollout, partial(update, loop, step, local, rollout, targets))
            learned |= critic_quality(rollout, targets)
    metrics = describe(drawn[0], loop.judge) | learned | loop.guarding.check(step + 1)
    if loop.algorithm.redraws:
        metrics["redraws"] = len(drawn) - 1.0
    if (target := loop.objective.kl_target) is not None:
        metrics["kl_coef"] = loop.kl_coef
        loop.kl_coef = adapted_kl_coef(loop.kl_coef, metrics["kl"], target)
    # In the reward's own unit: in standard deviations the score would fall as they grow.
    penalty = loop.objective.missing_end_penalty * loop.reward_scale.std
    metrics["score"] = metrics["reward"] - penalty * (1 - metrics["ended"])
    metrics["reward_std"] = loop.reward_scale.std
    if loop.validation is not None:
        scale = loop.reward_scale.std if loop.objective.normalize_rewards else 1.0
        metrics |= loop.validation.check(step + 1, loop.steps, scale)
    metrics = loop.collector.processes.broadcast(metrics | loop.liveness.after_step(step + 1))
    drew = {} if rollout.versions is None else {"adapter": rollout.versions[0]}
    return metrics, drew | loop.collector.reward.served


def collect_step(loop: Loop, step: int) -> tuple[Rollout, Rollout, list[Rollout]]:
    """Collect a step's rollout, local and global as from `collect`, and all rollouts sampled for it, in order."""
    drawn: list[Rollout] = []
    while True:
        chosen = loop.prompt_choice.of_step(step, len(drawn))
        local, rollout = collect(loop, step, loop.completed(chosen), len(drawn))
        drawn.append(rollout)
        right_B = rollout.rewards_B >= loop.objective.success_reward
        loop.prompt_choice.learn([chosen[group] for group in rollout.groups], right_B.tolist())
        differ = sum(int(differing(one).sum()) for one in drawn)
        if len(drawn) > loop.algorithm.redraws or differ >= len(rollout.groups):
            break
    if len(drawn) > 1:
        rollout = assembled(drawn, len(rollout.groups))
        local = rollout.take(loop.collector.processes.shard(len(rollout.groups)))
    return local, rollout, drawn


def begin_next(loop: Loop, step: int) -> None:
    """Let a sampler that works ahead start on a step's first rollout with the current policy."""
    if step < loop.steps:
        prompts = loop.completed(loop.prompt_choice.of_step(step))
        loop.collector.begin(Role.POLICY, prompts, loop.collector.generator("sample", step))


def collect(loop: Loop, step: int, prompts: EncodedPrompts, draw: int = 0) -> tuple[Rollout, Rollout]:
    """Sample and score; return the rollout of this process's share of the prompts and that of all processes.

    Args:
        draw: number of rollouts already sampled for this step.
    """
    collector = loop.collector
    local = collector.collect(
        Role.POLICY,
        prompts,
        collector.generator(f"redraw {draw}" if draw else "sample", step),
        critic=loop.learner.critic,
        phase=loop.meter.phase,
    )
    loop.meter.count(sum(local.prompt_lengths) + sum(local.completion_lengths))
    return local, local.gather(collector.processes, prompts)


def estimate(loop: Loop, rollout: Rollout, normalized_B: Tensor) -> Targets:
    """Return advantages and returns of the normalised rewards minus the penalties for missing end and length."""
    rewards_B = loop.objective.penalized(rollout, normalized_B, loop.reward_scale)
    targets = loop.algorithm.estimate(rollout, rewards_B, loop.kl_coef)
    if not loop.objective.correct_sampler:
        return targets
    weights_BT = importance_weights(
        rollout.policy_log_probs_BT,
        rollout.sampler_log_probs_BT,
        rollout.completion_mask_BT,
        LARGEST_WEIGHT,
    )
    return targets._replace(advantages_BT=targets.advantages_BT * weights_BT)


def update(loop: Loop, step: int, local: Rollout, rollout: Rollout, targets: Targets) -> dict[str, float]:
    """Update the policy and its critic, sync the sampler, and return the update's metrics."""
    metrics = loop.learner.update(step, local, rollout, targets)
    loop.collector.sampler.sync(Role.POLICY)
    return metrics


def critic_quality(rollout: Rollout, targets: Targets) -> dict[str, float]:
    """Return the share of the returns' variance explained by the critic, 1 - Var(R - V) / Var(R).

    1 is all of it; below 0 the critic does harm.
    """
    if targets.returns_BT is None or rollout.values_BT is None:
        return {}
    mask_BT = rollout.completion_mask_BT
    returns_N, values_N = targets.returns_BT[mask_BT], rollout.values_BT[mask_BT]
    unexplained, variance = (returns_N - values_N).var(correction=0), returns_N.var(correction=0)
    return {"explained_variance": float(1.0 - unexplained / variance.clamp(min=1e-12))}


def checkpoint(loop: Loop, step: int, initial: InitialEval) -> None:
    """Write the whole state after `step` steps."""
    learner = loop.learner
    state = snapshot.take(step, learner.roles, learner.trained, learner.optimizer)
    state.values.update(
        initial_eval=as_json(initial),
        liveness=as_json(loop.liveness.found),
        meter=loop.meter.times(),
        guard=loop.guarding.guard.state_dict(),
        reward_scale=as_json(loop.reward_scale),
        prompt_choice=loop.prompt_choice.state_dict(),
        kl_coef=loop.kl_coef,
    )
    keep = loop.guarding.worth_keeping(step, loop.checkpoints.steps())
    if loop.validation is not None:
        state.values["validation"] = loop.validation.found.state_dict()
        keep |= loop.validation.found.worth_keeping()
    loop.checkpoints.write(state, keep)


def resume(loop: Loop) -> tuple[InitialEval | None, int]:
    """Restore the newest checkpoint; return the initial evaluation and the number of steps done."""
    state = loop.checkpoints.newest()
    if state is None:
        return None, 0
    learner, values = loop.learner, state.values
    snapshot.restore(learner.roles, learner.trained, learner.optimizer, state, str(loop.checkpoints.folder))
    snapshot.set_generators(state, loop.collector.processes)
    loop.collector.sampler.sync(Role.POLICY)
    loop.meter.resume_from(values["meter"])
    loop.guarding.guard.load_state_dict(values["guard"])
    loop.reward_scale = RewardScale(**values["reward_scale"])
    loop.prompt_choice.load_state_dict(values["prompt_choice"])
    loop.kl_coef = values["kl_coef"]
    if loop.validation is not None:
        loop.validation.found.load_state_dict(values["validation"], loop.steps)
    found = values["liveness"]
    loop.liveness.found = None if found is None else [made(Check, check) for check in found]
    initial = made(InitialEval, values["initial_eval"])
    loop.preflight.resume_from(initial.preflight)
    return initial, state.step


def choose(loop: Loop, alarms: list[Alarm]) -> int:
    """Restore the policy that is kept, if it is not the last, and return its number of steps.

    It is the best by validation (without validation, the last) of those saved before any alarm's trouble began.
    """
    saved = loop.checkpoints.steps()
    good = saved[-1]
    if alarms:
        good = last_good(min(alarm.good_until for alarm in alarms), saved)
    best = None if loop.validation is None else loop.validation.found.best(until=good)
    step = best if best in saved else good
    if alarms or best is not None:
        tensors = loop.checkpoints.read(step).tensors
        learner = loop.learner
        snapshot.load_trained_state(learner.roles, learner.trained, tensors, str(loop.checkpoints.folder))
        loop.collector.sampler.sync(Role.POLICY)
    return step
