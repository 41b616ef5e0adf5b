"""Each stage tried by its own trainer: a few steps on the longest rows."""

from collections.abc import Callable

from perl.predict.rl import try_rl
from perl.predict.trial import TrialSession, Tried
from perl.recipe import StageName
from perl.roles.roles import Role
from perl.stages.reward import reward_trainer
from perl.stages.reward_rows import training_rows
from perl.stages.sft import sft_trainer, tokenized


def try_sft(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest demonstrations."""
    rows, trained = tokenized(session, session.train.demonstrations), session.add_trained(Role.SFT)
    with sft_trainer(session, rows, steps=session.trial.steps) as trainer:
        return session.take_steps(trainer, trained)


def try_reward(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest answers."""
    settings, rows = session.recipe.reward, training_rows(session)
    assert settings is not None
    trained = session.add_trained(Role.REWARD, head=True)
    with reward_trainer(session, rows, steps=session.trial.steps) as trainer:
        if settings.epochs > 1 and not session.trial.abridged:  # a cache of fake tensors could not be read
            trainer.cache_lower_layers(rows)
        return session.take_steps(trainer, trained)


TRY: dict[StageName, Callable[[TrialSession], Tried]] = {"sft": try_sft, "reward": try_reward, "rl": try_rl}
