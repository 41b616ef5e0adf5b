"""Each stage tried by its own setup and trainer: a few steps on the longest rows."""

from collections.abc import Callable

from perl.predict.rl import try_rl
from perl.predict.trial import TrialSession, Tried
from perl.recipe import StageName
from perl.stages import reward, sft
from perl.stages.reward_rows import training_rows


def try_sft(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest demonstrations."""
    rows = sft.tokenized(session, session.train.demonstrations)
    trained = sft.setup(session)
    with sft.sft_trainer(session, rows, steps=session.trial.steps) as trainer:
        return session.take_steps(trainer, trained)


def try_reward(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest answers."""
    settings, rows = session.recipe.reward, training_rows(session)
    assert settings is not None
    trained = reward.setup(session)
    with reward.reward_trainer(session, rows, steps=session.trial.steps) as trainer:
        if settings.epochs > 1 and not session.trial.abridged:  # a cache of fake tensors could not be read
            trainer.cache_lower_layers(rows)
        return session.take_steps(trainer, trained)


TRY: dict[StageName, Callable[[TrialSession], Tried]] = {"sft": try_sft, "reward": try_reward, "rl": try_rl}
