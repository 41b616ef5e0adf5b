"""What the RL stage trains with: all its state in one place, its beginning, and its checkpoints."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from perl.backbones.padding import left_pad
from perl.measure.meter import Meter
from perl.recipe import Rl
from perl.rl.algorithms import ALGORITHMS, Algorithm
from perl.rl.checks.alarms import Alarm
from perl.rl.checks.guarding import Guarding
from perl.rl.checks.guards import last_good
from perl.rl.prompts import encode_prompts, how_to_sample, reward_source
from perl.rl.rewards.combination import CombinedReward
from perl.rl.rewards.scale import RewardScale
from perl.rl.rollout import EncodedPrompts
from perl.rl.samplers.local import Sampling
from perl.rl.schedule import auto_head_learning_rate, auto_learning_rate, learning_rate_shares
from perl.roles.roles import Role
from perl.runs import snapshot
from perl.runs.checkpoint import Checkpoints, State
from perl.stages.session import Session


@dataclass
class Loop:
    """All state of RL training, in one place, and what the steps read."""

    settings: Rl
    session: Session
    algorithm: Algorithm
    reward: CombinedReward
    prompts: EncodedPrompts
    optimizer: torch.optim.Optimizer
    rates: list[float]
    """The full learning rates of weights and of heads, as the optimizer's groups."""
    rate_shares: list[float]
    """Of the full rates, what each step has."""
    reward_scale: RewardScale
    missing_end_penalty: float
    """In standard deviations of the reward."""
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

    @property
    def shared_head(self) -> Role | None:
        """Whose head reads values on the policy's trunk; None where there is none."""
        return self.value_head if self.critic == "shared" else None


def begin(session: Session, settings: Rl, held_out: EncodedPrompts) -> Loop:
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
        # What a reward model's head gives is on another scale than returns: the critic's begins at zero.
        with torch.no_grad():
            roles.head(Role.CRITIC).weight.zero_()
        learners.append(Role.CRITIC)
    roles.keep(roles.reference, Role.REWARD, *learners)
    roles.train_only(*learners)
    roles.eval()  # added adapters begin with dropout on, and there is none in RL
    weights = [parameter for role in learners for parameter in roles.weights(role).values()]
    heads = [parameter for role in learners if role in roles.heads for parameter in roles.heads[role].parameters()]
    prompts = encode_prompts(session, session.train.prompts)
    rates = learning_rates(session, settings, prompts)
    groups = [{"params": weights, "lr": rates[0]}, {"params": heads, "lr": rates[1]}]
    session.begin_together(weights + heads)
    groups = [group for group in groups if group["params"]]  # DeepSpeed fails on an empty one
    optimizer = session.engine.optimizer(torch.optim.AdamW(groups, weight_decay=0.0))
    penalty = missing_end_penalty(settings, session)
    return Loop(
        settings=settings,
        session=session,
        algorithm=resolved_algorithm(settings),
        reward=reward,
        prompts=prompts,
        optimizer=optimizer,
        rates=rates,
        rate_shares=learning_rate_shares(settings.lr_scheduler_type, settings.warmup_ratio, settings.steps),
        reward_scale=RewardScale(),
        missing_end_penalty=penalty,
        learners=learners,
        critic=critic,
        meter=session.meter(),
        sampling=sampling,
        checkpoints=session.checkpoints("rl"),
        guarding=Guarding(session, reward, sampling, held_out, rates[0], penalty > 0),
    )


def resolved_algorithm(settings: Rl) -> Algorithm:
    """The recipe's row of the table, with the recipe's constants."""
    return replace(
        ALGORITHMS[settings.algorithm],
        samples_per_prompt=settings.samples_per_prompt,
        gae_lambda=settings.gae_lambda,
        clip=settings.clip,
        value_clip=settings.value_clip,
        value_coef=settings.value_coef,
    )


@torch.no_grad()
def learning_rates(session: Session, settings: Rl, prompts: EncodedPrompts) -> list[float]:
    """The full learning rates of weights and of heads, for this base."""
    roles, weights, heads = session.roles, settings.learning_rate, settings.head_learning_rate
    ids_BL, mask_BL = left_pad(prompts.ids[:1], session.base.chat.pad_id, session.device)
    with roles.role(Role.POLICY):
        hidden_BLD = roles.trunk(ids_BL, mask_BL).float()
    width = hidden_BLD.shape[2]
    size = 1.0 if session.trial is not None else float(hidden_BLD.abs().mean())
    return [
        auto_learning_rate(width, session.recipe.tuning, settings.epochs) if weights == "auto" else weights,
        auto_head_learning_rate(width, size) if heads == "auto" else heads,
    ]


def missing_end_penalty(settings: Rl, session: Session) -> float:
    """What a completion without an end costs, in standard deviations of the reward.

    Plain text need not end within the tokens it gets; the turn of an agent that never ends is useless.
    """
    if settings.missing_end_penalty is not None:
        return settings.missing_end_penalty
    return 0.0 if session.train.prompts[0].context[-1].speaker == "text" else 0.5


def rollback(loop: Loop, alarms: list[Alarm]) -> int:
    """Put back what was learned at the last checkpoint before the trouble began; return its step."""
    step = last_good(min(alarm.good_until for alarm in alarms), loop.checkpoints.steps())
    tensors = loop.checkpoints.read(step).tensors
    snapshot.load_trained_state(loop.session.roles, loop.learners, tensors, str(loop.checkpoints.folder))
    return step


def checkpoint(loop: Loop, step: int, initial_eval: dict[str, Any]) -> None:
    """Write all state after so many steps; `initial_eval` is from before the first: it is costly to compute."""
    tensors, values = snapshot.take(loop.session.roles, loop.learners, loop.optimizer)
    values |= {
        "initial_eval": initial_eval,
        "meter": loop.meter.times(),
        "guard": loop.guarding.guard.state_dict(),
    }
    values["reward_scale"] = loop.reward_scale.state_dict()
    keep = loop.guarding.worth_keeping(step, loop.checkpoints.steps())
    loop.checkpoints.write(State(step, tensors, values), keep)


def resume(loop: Loop) -> tuple[dict[str, Any], int]:
    """Put back the newest checkpoint; return what was found before the first step, and how many are done."""
    found = loop.checkpoints.newest()
    if found is None:
        return {}, 0
    roles, state = loop.session.roles, (found.tensors, found.values)
    snapshot.restore(roles, loop.learners, loop.optimizer, state, str(loop.checkpoints.folder))
    snapshot.set_generators(state, loop.session.processes)
    loop.meter.resume_from(found.values["meter"])
    loop.guarding.guard.load_state_dict(found.values["guard"])
    loop.reward_scale = RewardScale(**found.values["reward_scale"])
    return found.values["initial_eval"], found.step
