"""The RL stage: sample, score, estimate, improve.

The policy begins as a copy of the SFT adapter (or as the identity on the bare base) and stays near it: that is
the reference. All randomness of a step follows from the recipe's seed and the step's number, so the whole
state of the loop is the step, the adapters and heads, and the optimizer.

Axis letters: B answers, T answer positions.
"""

import math
from functools import partial

import torch
from torch import Tensor

from perl.measure.change import fixed, measured_words
from perl.results import Check, RlEval, RlStage, Tried
from perl.rl.algorithms import Scored, Targets
from perl.rl.batches import micro_batches, trim
from perl.rl.checks.alarms import Alarm
from perl.rl.checks.liveness import Liveness
from perl.rl.checks.preflight import preflight
from perl.rl.evaluate import describe, evaluate_policy, policy_change
from perl.rl.loop import Loop, begin, checkpoint, resume, rollback
from perl.rl.prompts import draw_samples, encode_prompts, prompts_of, reward_context
from perl.rl.rewards.scale import ABSURD, FARTHEST
from perl.rl.rollouts import Rollout, everyones, roll_out
from perl.roles.roles import Role
from perl.stages.cut_rows import say_cut
from perl.stages.session import Session
from perl.system.interrupt import between_steps
from perl.system.progress import console, counted, track
from perl.system.seeds import derived_seed
from perl.system.typed_json import as_json, made

MAX_GRAD_NORM = 1.0
SAMPLES = 12
"""Held-out prompts whose answers are kept for people to read."""


def check(session: Session) -> None:
    """Refuse what RL cannot use, before anything is trained or written."""
    assert session.recipe.rl is not None
    prompts = [*session.train.prompts, *session.held_out.prompts]
    encode_prompts(session, prompts)
    context = reward_context(session)
    for part in session.recipe.rl.reward_parts:
        if not part.needs_model:  # that is trained first
            part.source(context)


def train_rl(session: Session) -> RlStage | Tried:
    """Train the policy (and its critic) and write them; return the stage's result."""
    settings = session.recipe.rl
    assert settings is not None
    eval_prompts = encode_prompts(session, session.held_out.prompts[: settings.eval_prompts])
    loop = begin(session, settings, eval_prompts)
    rows, cut = len(loop.prompts) + len(eval_prompts), loop.prompts.cut + eval_prompts.cut
    if session.trial is None:
        say_cut(cut, rows, settings.max_prompt_length or 0, "rl.max_prompt_length")
        console.print(_plan(loop))
    steps = session.trial.steps if session.trial else settings.steps
    initial_eval, done = resume(loop)
    liveness = Liveness(loop, initial_eval)
    if not initial_eval and not session.trial:
        initial_eval["preflight"] = as_json(preflight(session, loop.reward, loop.sampling, loop.prompts))
        reference = session.roles.reference
        initial_eval["before"] = evaluate_policy(session, loop.reward, reference, eval_prompts, say_spread=True)
        checkpoint(loop, 0, initial_eval)
    stopped_by: list[Alarm] = []
    with (
        session.folder.metrics("rl", done) as log,
        track("rl", steps, done) as bar,
        between_steps(session.processes) as stop,
    ):
        for step in range(done, steps):
            loop.step = step
            with loop.meter.step(loop.optimizer):
                mine, everyone = collect(loop)
                rewards_B = normalized(loop, everyone.answers.rewards_B)
                objective = penalized(loop, everyone, rewards_B)
                losses = {"no_signal": 1.0}
                if session.trial or loop.algorithm.has_signal(rewards_B):
                    targets = loop.algorithm.estimate(objective, settings.kl_coef)
                    losses = liveness.watch(everyone, partial(improve, loop, mine, everyone, targets))
                    if not session.trial:
                        losses |= critic_quality(objective, targets)
            metrics = describe(everyone, session.train.judge) | losses | loop.guarding.check(step + 1)
            # In the reward's own unit: in standard deviations it would fall as their spread grows.
            penalty = loop.missing_end_penalty * loop.reward_scale.std
            metrics["score"] = metrics["reward"] - penalty * (1 - metrics["ended"])
            metrics["reward_std"] = loop.reward_scale.std
            metrics = session.processes.broadcast(metrics | liveness.after_step(step + 1))
            log.write(step + 1, metrics)
            bar(reward=metrics["reward"], kl=metrics["kl"])
            if stopped_by := loop.guarding.alarms(step + 1, metrics):
                break
            last = stop.poll() or step + 1 == steps
            if not session.trial and (last or loop.checkpoints.due(step + 1)):
                checkpoint(loop, step + 1, initial_eval)
            if stop.requested:
                raise KeyboardInterrupt
    stage = session.stage(loop.meter, session.roles.parameters_of(*loop.learners), rows, cut)
    if session.trial is not None:
        return Tried(**vars(stage), step_seconds=loop.meter.step_seconds)
    remains = rollback(loop, stopped_by) if stopped_by else settings.steps
    after = evaluate_policy(session, loop.reward, Role.POLICY, eval_prompts)
    _save(session)
    shown = min(SAMPLES, len(eval_prompts))
    policies = [role for role in (Role.BASE, Role.SFT, Role.POLICY) if role in session.roles.roles]
    session.folder.write_samples(draw_samples(session, loop.reward, policies, eval_prompts.take(range(shown))))
    found = {
        "algorithm": settings.algorithm,
        "critic": loop.critic,
        "steps": remains,
        **policy_change(initial_eval["before"], after, eval_prompts),
    }
    return RlStage(
        **vars(stage),
        learning_rate=loop.rates[0],
        preflight=[made(Check, check) for check in initial_eval["preflight"]],
        liveness=[made(Check, check) for check in initial_eval.get("liveness", [])],
        incidents=loop.guarding.incidents(stopped_by, remains),
        eval=made(RlEval, found),
    )


def _plan(loop: Loop) -> str:
    """What a step is, with the values that stand for `auto`."""
    settings, (rate, head_rate) = loop.settings, loop.rates
    head = f", of the critic's head {head_rate:.2g}" if loop.algorithm.needs_critic else ""
    completions = counted(settings.prompts_per_step * settings.samples_per_prompt, "completion")
    return (
        f"RL by {settings.algorithm}: {counted(settings.steps, 'step')} of {completions} and "
        f"{counted(settings.epochs, 'update')}; learning rate {rate:.2g}{head}."
    )


def collect(loop: Loop) -> tuple[Rollout, Rollout]:
    """Sample and score: this process's answers to its share of the step's prompts, and those of all processes."""
    session, seed = loop.session, derived_seed(loop.session.recipe.seed, "sample", loop.step)
    session.roles.eval()
    generator = torch.Generator(session.device).manual_seed(seed)
    prompts = loop.prompts.take(prompts_of(session, loop.prompts, loop.step))
    mine = roll_out(
        session,
        loop.reward,
        Role.POLICY,
        prompts,
        loop.sampling,
        generator,
        shared=loop.shared_head,
        critic=Role.CRITIC if loop.critic == "adapter" else None,
        phase=loop.meter.phase,
    )
    samples = mine.answers.samples
    loop.meter.count(sum(samples.prompt_lengths) + sum(samples.completion_lengths))
    return mine, everyones(session, prompts, mine)


def normalized(loop: Loop, rewards_B: Tensor) -> Tensor:
    """The rewards that are trained on, fp32: in standard deviations of all so far, or as they are."""
    scale = loop.reward_scale
    if not loop.settings.normalize_rewards:
        scale.update(rewards_B)
        return rewards_B.float()
    within_B = scale.within(rewards_B)
    if loop.session.trial is None and (absurd := scale.absurd(rewards_B)) is not None:
        console.print(
            f"[yellow]Step {loop.step + 1}[/]: a reward of {absurd:.3g} lies more than {ABSURD:g} standard "
            f"deviations from the mean of those before, {scale.mean:.3g}; it counts as {FARTHEST:g}."
        )
    scale.update(within_B)
    return scale.normalized(within_B)


def penalized(loop: Loop, everyone: Rollout, rewards_B: Tensor) -> Scored:
    """The rollout with what the policy is to raise: the reward, less the penalty for a missing end."""
    std = loop.reward_scale.std
    spread = float(std > 0.0) if loop.settings.normalize_rewards else std
    missing_B = ~everyone.answers.samples.ended_B
    return everyone.scored._replace(scores_B=rewards_B - loop.missing_end_penalty * spread * missing_B)


def critic_quality(scored: Scored, targets: Targets) -> dict[str, float]:
    """How much of the returns' variance the critic explains, 1 - Var(R - V) / Var(R): 1 is all, below 0 harms."""
    if targets.returns_BT is None or scored.values_BT is None:
        return {}
    returns_N, values_N = targets.returns_BT[scored.mask_BT], scored.values_BT[scored.mask_BT]
    unexplained, variance = (returns_N - values_N).var(correction=0), returns_N.var(correction=0)
    return {"explained_variance": float(1.0 - unexplained / variance.clamp(min=1e-12))}


def improve(loop: Loop, mine: Rollout, everyone: Rollout, targets: Targets) -> dict[str, float]:
    """One update a pass over the rollout; the gradients of all micro-batches add up to the whole rollout's.

    An update whose loss or gradient is not finite is refused: nothing has changed then, and `refused` is 1.

    Args:
        mine: what this process learns from.
        everyone: what all learn from together.
        targets: of everyone.
    """
    roles, settings, processes = loop.session.roles, loop.settings, loop.session.processes
    rows = processes.shard(len(everyone.scored.scores_B))
    share = slice(rows[0], rows[-1] + 1)
    returns_BT = targets.returns_BT[share] if targets.returns_BT is not None else None
    targets = Targets(targets.advantages_BT[share], returns_BT)
    tokens = float(everyone.scored.mask_BT.sum())
    sums: dict[str, float] = {}
    mismatch = 0.0
    for epoch in range(settings.epochs):
        sums = dict.fromkeys(("policy_loss", "value_loss", "entropy", "sampler_mismatch", "clip_fraction"), 0.0)
        for rows in micro_batches(mine.answers.samples, settings.micro_batch_size):
            with roles.checkpointed(loop.session.recipe.checkpoint_activations):
                _accumulate(loop, mine, targets, rows, tokens, sums)
        processes.all_reduce_gradients(roles.parameters_of(*loop.learners))
        sums = {name: processes.all_reduce_sum(value) for name, value in sums.items()}
        groups = [roles.parameters_of(role) for role in loop.learners]
        norms = [float(torch.nn.utils.clip_grad_norm_(group, MAX_GRAD_NORM)) for group in groups]
        sums["grad_norm"] = max(norms)
        # Only before the first update is the policy the one that sampled: there they must agree.
        mismatch = sums["sampler_mismatch"] if epoch == 0 else mismatch
        if not all(math.isfinite(value) for value in (*norms, sums["policy_loss"], sums["value_loss"])):
            loop.optimizer.zero_grad(set_to_none=True)
            sums["refused"] = 1.0
            break
        for group, rate in zip(loop.optimizer.param_groups, loop.rates, strict=False):
            group["lr"] = rate * loop.rate_shares[loop.step]
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
    return sums | {"sampler_mismatch": mismatch, "learning_rate": loop.rates[0] * loop.rate_shares[loop.step]}


def _accumulate(
    loop: Loop, mine: Rollout, targets: Targets, rows: list[int], tokens: float, sums: dict[str, float]
) -> None:
    """Add the gradients of one micro-batch."""
    batch, scored = trim(mine.answers.samples, rows), mine.scored
    length, mask_bt = batch.completion_length, scored.mask_BT[rows, : batch.completion_length]
    read = partial(
        loop.session.roles,
        ids_BL=batch.ids_BL,
        mask_BL=batch.mask_BL,
        completion_length=length,
        lower_hidden_BLD=batch.lower_hidden_BLD,
    )
    policy = read(
        Role.POLICY,
        temperature=loop.settings.temperature,
        head=loop.shared_head,
        trunk_gradient=loop.algorithm.value_coef,
    )
    sampler_bt = scored.sampler_log_probs_BT[rows, :length]
    policy_loss, clipped = loop.algorithm.policy_loss(
        policy.log_probs_BT, sampler_bt, targets.advantages_BT[rows, :length], mask_bt, tokens
    )
    loss = policy_loss
    if targets.returns_BT is not None:
        assert scored.values_BT is not None
        values_bt = policy.values_BT
        if loop.shared_head is None:
            values_bt = read(Role.CRITIC, head=Role.CRITIC).values_BT
        value_loss = loop.algorithm.value_loss(
            values_bt, scored.values_BT[rows, :length], targets.returns_BT[rows, :length], mask_bt, tokens
        )
        loss = loss + value_loss
        sums["value_loss"] += float(value_loss.detach())
    loss.backward()  # type: ignore[no-untyped-call]
    sums["policy_loss"] += float(policy_loss.detach())
    sums["clip_fraction"] += float(clipped) if clipped is not None else 0.0
    sums["entropy"] += float(policy.entropy_BT.detach().sum()) / tokens
    gap_bt = (policy.log_probs_BT.detach() - sampler_bt).abs().masked_fill(~mask_bt, 0.0)
    sums["sampler_mismatch"] += float(gap_bt.sum()) / tokens


def _save(session: Session) -> None:
    session.save(Role.POLICY, parent=session.roles.reference)
    if Role.CRITIC in session.roles.roles:
        session.save(Role.CRITIC, parent=Role.REWARD)


def summary(stage: RlStage) -> None:
    """Say in words how much better the policy got."""
    found = stage.eval
    each = counted(found.samples_per_prompt or 1, "completion")
    text = (
        f"[bold]RL[/] ({found.algorithm}, {counted(found.steps, 'step')}): on "
        f"{counted(found.n, 'held-out prompt')}, {each} each, the reward "
        f"{measured_words(found.reward_before, found.reward_after, found.reward_interval)}, at a KL of "
        f"{fixed(found.kl, 1)} nats a completion."
    )
    if found.gold_before is not None and found.gold_after is not None:
        text += (
            " The share that the gold judge, which training never sees, finds right "
            f"{measured_words(found.gold_before, found.gold_after, found.gold_interval, percent=True)}."
        )
    console.print(text)
    for incident in stage.incidents:
        if incident.action == "stopped":
            console.print(
                f"[yellow]RL was stopped at step {incident.step}[/]: {incident.what}. What remains is the "
                f"policy after {incident.remains} updates, from before that. {incident.remedy}"
            )
