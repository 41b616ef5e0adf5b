"""The RL stage: sample, score, estimate, improve.

The policy begins as a copy of the SFT adapter (or as the identity on the bare base) and stays near it: that is
the reference. All randomness of a step follows from the recipe's seed and the step's number, so the whole
state of the loop is the step, the adapters and heads, and the optimizer.

Axis letters: B answers, T answer positions.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from perl.checkpoint import Checkpoints, State
from perl.interrupt import between_steps
from perl.measure.meter import Meter
from perl.model.roles import Role
from perl.progress import console, track
from perl.recipe import Rl
from perl.rl.alarms import Alarm
from perl.rl.algorithms import Algorithm, Scored, Targets, algorithm
from perl.rl.batches import micro_batches, trim
from perl.rl.guards import last_good
from perl.rl.rewards import RewardFunction, RewardSource
from perl.rl.rollout import (
    Answers,
    EncodedPrompts,
    answer,
    read_answers,
    score,
    scored,
)
from perl.rl.sampler import Sampling
from perl.stages import snapshot
from perl.stages.guarding import Guarding
from perl.stages.policy import (
    describe,
    draw_samples,
    encode_prompts,
    evaluate_policy,
    how_to_sample,
    prompts_of,
    reward_source,
)
from perl.stages.preflight import preflight
from perl.stages.session import Session, derived_seed

VALUE_COEF = 0.1
"""Weight of the critic's loss beside the policy's."""
HEAD_LEARNING_RATE = 10.0
"""A head learns this much faster than an adapter: it starts from zero and has no bottleneck."""
MAX_GRAD_NORM = 1.0
SAMPLES = 12
"""Held-out prompts whose answers are kept for people to read."""


@dataclass
class Loop:
    """All state of RL training, in one place, and what the steps read."""

    settings: Rl
    session: Session
    algorithm: Algorithm
    reward: RewardSource
    prompts: EncodedPrompts
    accelerator: Accelerator
    model: Any
    optimizer: Any
    learners: list[Role]
    critic: str
    """`shared`, `adapter` or `none`."""
    meter: Meter
    sampling: Sampling
    checkpoints: Checkpoints
    guarding: Guarding
    step: int = 0

    @property
    def value_head(self) -> Role | None:
        """Whose head reads values; None without a critic."""
        return Role.CRITIC if self.algorithm.needs_critic else None


def check(session: Session) -> None:
    """Refuse what RL cannot use, before anything is trained or written."""
    assert session.recipe.rl is not None
    encode_prompts(session, [*session.train.prompts, *session.held_out.prompts])
    if session.recipe.rl.reward.function is not None:
        RewardFunction(session.recipe.rl.reward.function)


def train_rl(session: Session) -> dict[str, Any]:
    """Train the policy (and its critic) and write them; return the stage's result."""
    settings = session.recipe.rl
    assert settings is not None
    eval_prompts = encode_prompts(session, session.held_out.prompts[: settings.eval_prompts])
    loop = _begin(session, settings, eval_prompts)
    steps = session.trial.steps if session.trial else settings.steps
    opening, done = _go_on(loop)
    if not opening and not session.trial:
        opening["preflight"] = preflight(session, loop.reward, loop.sampling, loop.prompts)
        opening["before"] = evaluate_policy(session, loop.reward, session.roles.reference, eval_prompts)
        _checkpoint(loop, 0, opening)
    stopped_by: list[Alarm] = []
    with (
        session.folder.metrics("rl", done) as log,
        track("rl", steps, done) as bar,
        between_steps() as leaving,
    ):
        for step in range(done, steps):
            loop.step = step
            with loop.meter.step(loop.optimizer):
                answers, rollout = collect(loop)
                targets = loop.algorithm.estimate(rollout, settings.kl_coef)
                losses = improve(loop, answers, rollout, targets)
                loop.meter.count(sum(answers.samples.prompt_lengths) + sum(answers.samples.answer_lengths))
            figures = describe(answers, rollout, session.train.judge) | losses | loop.guarding.check(step + 1)
            log.write(step + 1, figures)
            bar(reward=figures["reward"], kl=figures["kl"])
            if stopped_by := loop.guarding.alarms(step + 1, figures):
                break
            last = leaving.wanted or step + 1 == steps
            if not session.trial and (last or loop.checkpoints.due(step + 1)):
                _checkpoint(loop, step + 1, opening)
            if leaving.wanted:
                raise KeyboardInterrupt
    learnt = sum(parameter.numel() for parameter in session.roles.parameters_of(*loop.learners))
    result = {"trainable_parameters": learnt, **loop.meter.figures()}
    if session.trial is not None:
        return result | {"step_seconds": loop.meter.step_seconds}
    remains = _go_back(loop, stopped_by) if stopped_by else settings.steps
    after = evaluate_policy(session, loop.reward, Role.POLICY, eval_prompts)
    _save(session)
    shown = min(SAMPLES, len(eval_prompts))
    policies = [role for role in (Role.BASE, Role.SFT, Role.POLICY) if role in session.roles.roles]
    session.folder.write_samples(draw_samples(session, loop.reward, policies, eval_prompts.take(range(shown))))
    return {
        **result,
        "preflight": opening["preflight"],
        "incidents": loop.guarding.incidents(stopped_by, remains),
        "eval": {
            "algorithm": settings.algorithm,
            "critic": loop.critic,
            "steps": remains,
            "n": len(eval_prompts),
            **{f"{name}_before": value for name, value in opening["before"].items() if name != "kl"},
            **{f"{name}_after": value for name, value in after.items() if name != "kl"},
            "kl": after["kl"],
        },
    }


def collect(loop: Loop) -> tuple[Answers, Scored]:
    """Sample and score: answers of the policy to this step's prompts, their rewards, reference and values."""
    session, settings, roles = loop.session, loop.settings, loop.session.roles
    roles.eval()
    generator = torch.Generator(session.device).manual_seed(derived_seed(session.recipe.seed, "sample", loop.step))
    prompts = loop.prompts.take(prompts_of(session, loop.prompts, loop.step))
    shared = loop.value_head if loop.critic == "shared" else None
    with loop.meter.phase("generate"):
        samples, texts = answer(
            roles, Role.POLICY, session.base.chat, prompts, loop.sampling, generator, head=shared
        )
    with loop.meter.phase("score"):
        answers = score(loop.reward, prompts, samples, texts, settings.missing_end_penalty)
        reference_BT, _ = read_answers(
            roles, roles.reference, samples, settings.micro_batch_size, temperature=settings.temperature, head=None
        )
        values_BT = samples.values_BT
        if loop.critic == "adapter":
            _, values_BT = read_answers(
                roles, Role.CRITIC, samples, settings.micro_batch_size, temperature=None, head=Role.CRITIC
            )
    assert reference_BT is not None
    return answers, scored(answers, reference_BT, values_BT)


def improve(loop: Loop, answers: Answers, rollout: Scored, targets: Targets) -> dict[str, float]:
    """One update a pass over the rollout; micro-batches' gradients add up to the whole rollout's.

    An update whose loss or gradient is not finite is refused: nothing has changed then, and `refused` is 1.
    """
    samples, settings = answers.samples, loop.settings
    tokens = float(rollout.mask_BT.sum())
    sums: dict[str, float] = {}
    mismatch = 0.0
    for epoch in range(settings.epochs):
        sums = {"policy_loss": 0.0, "value_loss": 0.0, "entropy": 0.0, "sampler_mismatch": 0.0}
        for rows in micro_batches(samples, settings.micro_batch_size):
            with loop.session.roles.checkpointed(loop.session.recipe.checkpoint_activations):
                _accumulate(loop, answers, rollout, targets, rows, tokens, sums)
        groups = [loop.session.roles.parameters_of(role) for role in loop.learners]
        norms = [float(torch.nn.utils.clip_grad_norm_(group, MAX_GRAD_NORM)) for group in groups]
        sums["grad_norm"] = max(norms)
        # Only before the first update is the policy the one that sampled: there they must agree.
        mismatch = sums["sampler_mismatch"] if epoch == 0 else mismatch
        if not all(math.isfinite(value) for value in (*norms, sums["policy_loss"], sums["value_loss"])):
            loop.optimizer.zero_grad(set_to_none=True)
            sums["refused"] = 1.0
            break
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
    return sums | {"sampler_mismatch": mismatch}


def _accumulate(
    loop: Loop,
    answers: Answers,
    rollout: Scored,
    targets: Targets,
    rows: list[int],
    tokens: float,
    sums: dict[str, float],
) -> None:
    """Add the gradients of one micro-batch."""
    batch = trim(answers.samples, rows)
    length, mask_bt = batch.answer_length, rollout.mask_BT[rows, : batch.answer_length]
    read = partial(
        loop.model, ids_BL=batch.ids_BL, mask_BL=batch.mask_BL, answer_length=length, below_BLD=batch.below_BLD
    )
    shared = loop.value_head if loop.critic == "shared" else None
    policy = read(Role.POLICY, temperature=loop.settings.temperature, head=shared)
    sampler_bt = rollout.sampler_log_probs_BT[rows, :length]
    policy_loss = loop.algorithm.policy_loss(
        policy.log_probs_BT, sampler_bt, targets.advantages_BT[rows, :length], mask_bt, tokens
    )
    loss = policy_loss
    if targets.returns_BT is not None:
        assert rollout.values_BT is not None
        values_bt = policy.values_BT
        if shared is None:
            values_bt = read(Role.CRITIC, head=Role.CRITIC).values_BT
        value_loss = loop.algorithm.value_loss(
            values_bt, rollout.values_BT[rows, :length], targets.returns_BT[rows, :length], mask_bt, tokens
        )
        loss = loss + VALUE_COEF * value_loss
        sums["value_loss"] += float(value_loss.detach())
    loop.accelerator.backward(loss)
    sums["policy_loss"] += float(policy_loss.detach())
    sums["entropy"] += float(policy.entropy_BT.detach().sum()) / tokens
    gap_bt = (policy.log_probs_BT.detach() - sampler_bt).abs().masked_fill(~mask_bt, 0.0)
    sums["sampler_mismatch"] += float(gap_bt.sum()) / tokens


def _begin(session: Session, settings: Rl, held_out: EncodedPrompts) -> Loop:
    """The policy, its critic and their optimizer, before the first step."""
    roles, critic, sampling = session.roles, session.recipe.critic, how_to_sample(session)
    if session.recipe.sft is not None:
        session.load(Role.SFT)
    reward = reward_source(session)
    roles.add(Role.POLICY, copy_of=roles.reference)
    learners = [Role.POLICY]
    if critic != "none":
        start = Role.REWARD if critic == "adapter" and Role.REWARD in roles.roles else Role.BASE
        roles.add(Role.CRITIC, copy_of=start, weights=critic == "adapter", head=True)
        learners.append(Role.CRITIC)
    roles.keep(roles.reference, Role.REWARD, *learners)
    roles.train_only(*learners)
    weights = [parameter for role in learners for parameter in roles.weights(role).values()]
    heads = [parameter for role in learners if role in roles.heads for parameter in roles.heads[role].parameters()]
    groups = [{"params": weights, "lr": settings.learning_rate}]
    if heads:
        groups.append({"params": heads, "lr": settings.learning_rate * HEAD_LEARNING_RATE})
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(roles, torch.optim.AdamW(groups, weight_decay=0.0))
    return Loop(
        settings=settings,
        session=session,
        algorithm=algorithm(settings.algorithm, settings.samples_per_prompt),
        reward=reward,
        prompts=encode_prompts(session, session.train.prompts),
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        learners=learners,
        critic=critic,
        meter=session.meter(),
        sampling=sampling,
        checkpoints=session.checkpoints("rl"),
        guarding=Guarding(session, reward, sampling, held_out),
    )


def _go_back(loop: Loop, alarms: list[Alarm]) -> int:
    """Put back what was learnt at the last checkpoint before the trouble began; return its step."""
    step = last_good(min(alarm.good_until for alarm in alarms), loop.checkpoints.steps())
    tensors = loop.checkpoints.read(step).tensors
    snapshot.load_learnt(loop.session.roles, loop.learners, tensors, str(loop.checkpoints.folder))
    return step


def _checkpoint(loop: Loop, step: int, opening: dict[str, Any]) -> None:
    """Write all state after so many steps; `opening` is what was found before the first, costly to find again."""
    tensors, values = snapshot.take(loop.session.roles, loop.learners, snapshot.unwrapped(loop.optimizer))
    values |= {"opening": opening, "meter": loop.meter.times(), "guard": loop.guarding.guard.state_dict()}
    keep = loop.guarding.worth_keeping(step, loop.checkpoints.steps())
    loop.checkpoints.write(State(step, tensors, values), keep)


def _go_on(loop: Loop) -> tuple[dict[str, Any], int]:
    """Put back the newest checkpoint; return what was found before the first step, and how many are done."""
    found = loop.checkpoints.newest()
    if found is None:
        return {}, 0
    state, optimizer = (found.tensors, found.values), snapshot.unwrapped(loop.optimizer)
    snapshot.restore(loop.session.roles, loop.learners, optimizer, state, str(loop.checkpoints.folder))
    snapshot.set_generators(state)
    loop.meter.go_on_from(found.values["meter"])
    loop.guarding.guard.load_state_dict(found.values["guard"])
    return found.values["opening"], found.step


def _save(session: Session) -> None:
    session.save(Role.POLICY, parent=session.roles.reference)
    if Role.CRITIC in session.roles.roles:
        session.save(Role.CRITIC, parent=Role.REWARD)


def summary(result: dict[str, Any]) -> None:
    """Say in words how much better the policy got."""
    figures = result["eval"]
    better = "rose" if figures["reward_after"] > figures["reward_before"] else "did not rise"
    text = (
        f"[bold]RL[/] ({figures['algorithm']}, {figures['steps']} steps): on {figures['n']} held-out prompts the "
        f"reward {better}, {figures['reward_before']:.2f} before and {figures['reward_after']:.2f} after, at a KL "
        f"of {figures['kl']:.1f} nats an answer."
    )
    if "gold_before" in figures:
        text += (
            f" The gold judge, which training never sees, found {figures['gold_before']:.0%} of the answers right "
            f"before and {figures['gold_after']:.0%} after."
        )
    console.print(text)
    for incident in result.get("incidents", []):
        if incident["action"] == "stopped":
            console.print(
                f"[yellow]RL was stopped at step {incident['step']}[/]: {incident['what']}. What remains is the "
                f"policy after {incident['remains']} updates, from before that. {incident['remedy']}"
            )
