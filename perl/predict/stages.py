"""Trials of each stage with its own trainer: a few steps on the longest rows."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from perl.predict.rl import try_rl
from perl.predict.trial import TrialSession, Tried
from perl.recipe import StageName
from perl.roles.role import Role
from perl.stages.reward import lower_layer_cache, reward_trainer
from perl.stages.reward_rows import training_rows


def try_sft(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest demonstrations."""
    from perl.stages.sft import sft_trainer, tokenized  # imports TRL, which the other stages do not need

    rows = tokenized(session, session.train.demonstrations)
    session.add_trained(Role.SFT)
    with sft_trainer(session, rows, steps=session.trial.steps) as trainer:
        return session.take_steps(trainer)


def try_reward(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest completions."""
    settings, rows, members = session.recipe.reward, training_rows(session), session.reward_members
    assert settings is not None
    for role in members:  # the last is trained with all previous ones in memory
        session.add_trained(role, head=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        reward_trainer(session, role, rows, steps=session.trial.steps) as trainer,
    ):
        again = settings.epochs > 1 or len(members) > 1
        if again and not session.trial.abridged:  # a cache of fake tensors could not be read
            trainer.lower_layers = lower_layer_cache(session, rows, Path(scratch))
        return session.take_steps(trainer)


TRY: dict[StageName, Callable[[TrialSession], Tried]] = {"sft": try_sft, "reward": try_reward, "rl": try_rl}
