"""Builds the parts of the RL loop from the recipe's settings."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from perl.backbones.padding import left_pad
from perl.backbones.shared_prompts import unsupported_reason
from perl.data.records import Prompt
from perl.recipe import Rl
from perl.rl.algorithm import Algorithm
from perl.rl.checks.findings import CLOSE_LOG_PROBS
from perl.rl.checks.guard_state import Limits
from perl.rl.checks.guarding import FEWEST, MOST, Guarding, validation_interval
from perl.rl.checks.liveness import Liveness
from perl.rl.checks.preflight import COMPLETIONS, Preflight
from perl.rl.collector import Collector
from perl.rl.loop import Loop
from perl.rl.objective import Objective
from perl.rl.prompt_choice import PromptChoice, easiest_first
from perl.rl.prompts import encode_prompts
from perl.rl.rewards.scale import RewardScale
from perl.rl.rollout import EncodedPrompts
from perl.rl.samplers import SAMPLERS
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.rl.update import Learner, learning_rate_shares
from perl.rl.validation import PolicyValidation
from perl.roles.role import Role
from perl.runs.validation import Validation
from perl.stages.adamw import exact_on_average
from perl.stages.auto_rates import auto_head_learning_rate, learning_rate
from perl.stages.rl_preflight import earlier_stages
from perl.stages.rl_rewards import combined_reward, end_ids, reward_context, settings_of
from perl.stages.session import Session
from perl.stages.validation_rows import validation_split
from perl.system.progress import console


def tokenized_prompts(session: Session, prompts: Sequence[Prompt]) -> EncodedPrompts:
    """Tokenize prompts, truncated to the lengths of the recipe and the base."""
    settings = settings_of(session)
    return encode_prompts(
        prompts,
        session.base.chat,
        context_length=session.base.context_length,
        max_new_tokens=settings.max_new_tokens,
        limit=settings.max_prompt_length,
        source=f"data.source {session.recipe.data.source}",
    )


def eval_prompts(session: Session) -> EncodedPrompts:
    """Return the held-out prompts that a policy is evaluated on."""
    return tokenized_prompts(session, session.held_out.prompts[: settings_of(session).eval_prompts])


def setup_collector(session: Session) -> Collector:
    """Return a collector with the recipe's sampler and reward, for the roles in memory."""
    settings, chat, context = settings_of(session), session.base.chat, reward_context(session)
    sampler = SAMPLERS[settings.sampler.kind](session.roles, settings.sampler.settings)
    for role in sorted(session.roles.roles):
        sampler.sync(role)
    return Collector(
        roles=session.roles,
        sampler=sampler,
        reward=combined_reward(settings.reward_parts, context),
        sampling=Sampling(
            settings.max_new_tokens, settings.temperature, end_ids(session), chat.pad_id, settings.micro_batch_size
        ),
        chat=chat,
        micro_batch_size=settings.micro_batch_size,
        seed=session.recipe.seed,
        eval_samples=settings.eval_samples,
    )


def finished_collector(session: Session) -> Collector:
    """Return a collector for a finished run, with its reference and its policy loaded."""
    session.load_reference()
    session.load(Role.POLICY)
    collector = setup_collector(session)
    if settings_of(session).sampler.kind == "server":  # which may no longer run
        collector = replace(collector, sampler=LocalSampler(session.roles))
    return collector


def setup(session: Session, held_out: EncodedPrompts) -> Loop:
    """Return the loop before its first step, with the policy, its critic and their optimizer."""
    settings = settings_of(session)
    session.load_reference()
    if any(part.needs_model for part in (*settings.reward_parts, *settings.eval_reward_parts)):
        for role in session.reward_members:  # before roles to train are added: adding turns all gradients off
            session.load(role)
    collector = setup_collector(session)
    trained = _add_roles(session)
    for role in trained:
        collector.sampler.sync(role)
    train, validation = validation_split(session, "rl")
    prompts = tokenized_prompts(session, train.prompts)
    if settings.samples_per_prompt > 1 and not session.roles.backbone.encodes_prompts:
        share_prompts(session, prompts)
    learner = _learner(session, trained, prompts)
    penalty = missing_end_penalty(settings, session.train.prompts[0])
    few = prompts.take(range(min(COMPLETIONS, len(prompts), settings.prompts_per_step)))
    step_key, step_size = learner.step_size
    limits = Limits(
        kl=settings.kl_limit,
        penalized=penalty > 0,
        # A lagging sampler differs by the policy's movement, and is checked with the weights it sampled with.
        mismatch=math.inf if collector.sampler.lags else CLOSE_LOG_PROBS[collector.dtype],
        step_key=step_key,
        step_size=step_size,
        check_every=validation_interval(settings.steps),
        kl_term=settings.row.kl != "none" and settings.kl_coef > 0,
        hold=how_to_hold(settings.row),
    )
    guarded = held_out.take(range(min(len(held_out), MOST, max(FEWEST, settings.prompts_per_step))))
    preflight = Preflight(collector, few, str(session.folder.path), earlier_stages(session, collector.reward))
    return Loop(
        collector=collector,
        learner=learner,
        objective=_objective(settings, learner.algorithm, penalty),
        prompts=prompts,
        steps=settings.steps,
        prompts_per_step=settings.prompts_per_step,
        samples_per_prompt=settings.samples_per_prompt,
        judge=session.train.judge,
        preflight=preflight,
        liveness=Liveness(learner, preflight, settings.guard),
        guarding=Guarding(collector, guarded, settings.guard, limits, judged=session.train.judge is not None),
        meter=session.meter(),
        checkpoints=session.checkpoints(Role.POLICY),
        reward_scale=RewardScale(),
        prompt_choice=_prompt_choice(session, prompts),
        kl_coef=settings.kl_coef,
        validation=None if validation is None else _validation(session, collector, validation.prompts),
    )


def _validation(session: Session, collector: Collector, prompts: Sequence[Prompt]) -> PolicyValidation:
    """Return the validation that chooses between policies, as set in the recipe."""
    settings, parts = settings_of(session), settings_of(session).eval_reward_parts
    assert settings.eval_steps is not None
    by, kl_weight, kl, beta = "the reward minus the KL penalty", 0.0, settings.row.kl, settings.kl_coef
    if settings.eval_reward is None and kl != "none":  # a KL in the loss does not scale r by 1 - β
        kl_weight = beta / (1 - beta) if kl == "reward-k1" else beta
    if settings.eval_reward == "gold":
        by = "the gold judge"
    elif parts:
        by = "rl.eval_reward"
        collector = replace(collector, reward=combined_reward(parts, reward_context(session)))
    encoded = tokenized_prompts(session, prompts[: settings.eval_prompts])
    found = Validation(settings.eval_steps, settings.early_stopping_patience, by, len(encoded), sign=1)
    judge = session.train.judge if settings.eval_reward == "gold" else None
    return PolicyValidation(collector, encoded, judge, kl_weight, found)


def share_prompts(session: Session, prompts: EncodedPrompts) -> None:
    """Compute each prompt once for all its completions, or print why that is not possible."""
    roles, length = session.roles, settings_of(session).max_new_tokens
    reason = unsupported_reason(roles.backbone, roles.models()[0], max(prompts.ids, key=len), length)
    roles.shares_prompts = reason is None
    if reason is not None:
        console.print(f"[yellow]Prompts are computed separately for each of their completions[/]: {reason}.")


def how_to_hold(row: Algorithm) -> str:
    """Return what a user can do to keep the policy closer to its reference: without a KL term, β has no effect."""
    if row.kl != "none":
        return "raise rl.kl_coef"
    return "raise rl.tau" if row.surrogate == "mirror" else "set rl.kl, such as to loss-k3"


def _objective(settings: Rl, row: Algorithm, penalty: float) -> Objective:
    return Objective(
        normalize_rewards=row.normalize_rewards,
        missing_end_penalty=penalty,
        overlong_penalty=settings.overlong_penalty,
        length_reward=settings.length_reward,
        length_reward_from=round(settings.length_reward_delay * settings.steps),
        overlong_buffer=settings.overlong_buffer or max(1, settings.max_new_tokens // 5),
        success_reward=settings.success_reward,
        kl_target=settings.kl_target,
        correct_sampler=settings.sampler_correction == "truncate",
    )


def _prompt_choice(session: Session, prompts: EncodedPrompts) -> PromptChoice:
    settings, kind = settings_of(session), settings_of(session).prompt_sampling
    source = f"data.source {session.recipe.data.source}"
    order = easiest_first(prompts.prompts, source) if kind == "curriculum" else None
    return PromptChoice(kind, len(prompts), settings.prompts_per_step, settings.steps, session.recipe.seed, order)


def _add_roles(session: Session) -> tuple[Role, ...]:
    """Add the policy and its critic; return the roles to train."""
    roles, critic = session.roles, session.recipe.critic
    roles.add(Role.POLICY, copy_of=roles.reference)
    trained: tuple[Role, ...] = (Role.POLICY,)
    if critic != "none":
        start = Role.REWARD if critic == "adapter" and Role.REWARD in roles.roles else Role.BASE
        roles.add(Role.CRITIC, copy_of=start, weights=critic == "adapter", head=True)
        # A reward model's scores have a different scale than returns: the critic's head starts at zero.
        with torch.no_grad():
            roles.head(Role.CRITIC).weight.zero_()
        trained = (Role.POLICY, Role.CRITIC)
    roles.keep(roles.reference, *session.reward_members, *trained)
    roles.train_only(*trained)
    roles.eval()  # new adapters start with dropout on; RL uses none
    return trained


def _learner(session: Session, trained: tuple[Role, ...], prompts: EncodedPrompts) -> Learner:
    settings, roles = settings_of(session), session.roles
    weights = roles.by_learning_rate(*trained)
    heads = [
        parameter for role in trained if role in roles.heads for parameter in roles.head_weights(role).values()
    ]
    rate, head_rate = learning_rates(session, prompts)
    rates = [*(rate * ratio for ratio in weights), head_rate]
    of_rates = [*weights.values(), heads]
    session.begin_together(itertools.chain(*of_rates))
    groups = [
        {"params": parameters, "lr": rate}
        for parameters, rate in zip(of_rates, rates, strict=True)
        if parameters  # DeepSpeed fails on an empty group
    ]
    optimizer = exact_on_average(torch.optim.AdamW(groups, weight_decay=settings.weight_decay))
    if settings.row.direction != "natural":  # which reads all moments in every process
        optimizer = session.engine.optimizer(optimizer)
    return Learner(
        roles=roles,
        algorithm=settings.row,
        trained=trained,
        optimizer=optimizer,
        rates=rates,
        rate_shares=learning_rate_shares(settings.lr_scheduler_type, settings.warmup_ratio, settings.steps),
        epochs=settings.epochs,
        minibatches=settings.minibatches,
        seed=session.recipe.seed,
        micro_batch_size=settings.micro_batch_size,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        checkpoint_activations=session.recipe.checkpoint_activations,
    )


@torch.no_grad()
def learning_rates(session: Session, prompts: EncodedPrompts) -> list[float]:
    """Return the peak learning rates of weights and of heads for this base."""
    heads, roles = settings_of(session).head_learning_rate, session.roles
    ids_BL, mask_BL = left_pad(prompts.ids[:1], session.base.chat.pad_id, session.device)
    with roles.role(Role.POLICY):
        hidden_BLD = roles.trunk(ids_BL, mask_BL).float()
    size = float(hidden_BLD.abs().mean())
    return [
        learning_rate(session.recipe, "rl", roles.models()[0].config),
        auto_head_learning_rate(hidden_BLD.shape[2], size) if heads == "auto" else heads,
    ]


def missing_end_penalty(settings: Rl, prompt: Prompt) -> float:
    """Return the penalty for a completion without an end, in standard deviations of the reward."""
    if settings.missing_end_penalty is not None:
        return settings.missing_end_penalty
    return 0.0 if prompt.context[-1].speaker == "text" else 0.5
