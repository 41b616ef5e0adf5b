"""The rewards of RL: this run's reward model, another run's or a server's, functions and rules."""

import functools
from collections.abc import Sequence

import torch

from perl.errors import UserError
from perl.measure.ensemble import Combine
from perl.measure.verdict import Verdict
from perl.recipe import Rl
from perl.recipe.reward_parts import RewardPart
from perl.rl.checks.preflight import CLOSE
from perl.rl.rewards.base import RewardContext, RewardServers
from perl.rl.rewards.combination import CombinedReward
from perl.rl.rewards.model import OtherRunsModel, RewardModel
from perl.rl.rewards.server import ServedModel
from perl.roles.role import Role
from perl.roles.saved import stamp_for
from perl.stages.opening import open_run
from perl.stages.session import Session
from perl.system.seeds import seed_everything


def settings_of(session: Session) -> Rl:
    """Return the recipe's section `rl`."""
    assert session.recipe.rl is not None
    return session.recipe.rl


def combined_reward(parts: Sequence[RewardPart], context: RewardContext) -> CombinedReward:
    """Return the weighted sum of the parts of a reward."""
    return CombinedReward([(part.source(context), part.weight) for part in parts])


def reward_context(session: Session) -> RewardContext:
    """Return what the parts of the reward can be built from."""

    def model(numbers: Sequence[int] | None, combine: Combine, std_weight: float) -> RewardModel:
        members = session.reward_members
        chosen = [members[number - 1] for number in numbers] if numbers else members
        for role in chosen:
            session.load(role)
        stamps = {role: session.stamp(role) for role in chosen}
        size, ends = settings_of(session).micro_batch_size, end_ids(session)
        return RewardModel(session.roles, stamps, size, ends, combine, std_weight)

    def model_of(run: str) -> OtherRunsModel:
        settings, scorer = settings_of(session), _scorer(run, f"rl.reward.run: {run}")
        trained = scorer.folder.results().reward
        if trained is not None and not (settings.anyway or trained.eval.verdict.fit):
            raise unfit_for_rl(trained.eval.verdict, str(scorer.folder.role(Role.REWARD)))
        stamps = {role: scorer.stamp(role) for role in scorer.reward_members}
        stamp, own = stamps[Role.REWARD], stamp_for(Role.REWARD, session.base)
        if (stamp.tokenizer_sha256, stamp.chat_sha256) != (own.tokenizer_sha256, own.chat_sha256):
            raise UserError(
                f"its reward model has a different tokenizer or chat format than {session.base.name}",
                where=f"rl.reward.run: {run}",
                remedy="Train the reward model on a base with this tokenizer and chat template.",
            )
        seed_everything(session.recipe.seed)  # opening a run sets the seed of that run's recipe
        return OtherRunsModel(RewardModel(scorer.roles, stamps, settings.micro_batch_size, end_ids(session)))

    def served(servers: RewardServers) -> ServedModel:
        trained = session.recipe.reward is not None and session.saved(Role.REWARD).exists()
        limit = servers.mismatch_limit or CLOSE[getattr(torch, session.recipe.base.dtype)]
        return ServedModel(servers, limit, end_ids(session), session.stamp(Role.REWARD) if trained else None)

    return RewardContext([*session.train.prompts, *session.held_out.prompts], model, model_of, served)


@functools.lru_cache(maxsize=1)
def _scorer(run: str, where: str) -> Session:
    """Open a run and load its reward model; cached, because later runs in this process often use it too."""
    session = open_run(run)
    if session.folder.result("reward") is None:
        raise UserError("this run has no reward model", where=where, remedy="Finish its reward stage first.")
    for role in session.reward_members:
        session.load(role)
    session.roles.eval()
    return session


def unfit_for_rl(verdict: Verdict, where: str) -> UserError:
    """Return the error for a reward model that is not fit for RL, with the first reason."""
    return UserError(
        f"the reward model is not fit for RL: {verdict.reasons[0]}",
        where=where,
        remedy="Train a better one: more ratings, a stronger base. Or train against it anyway with "
        "rl.anyway=true: the report's headline then shows the verdict.",
    )


def end_ids(session: Session) -> tuple[int, ...]:
    """Return the token ids that end a completion, for plain text or agent turns."""
    return session.base.chat.ends(session.train.prompts[0].context)
