"""Reward training tried: the stage's own setup and trainer."""

from perl.predict.trial import TrialSession, Tried
from perl.stages.reward import reward_trainer, setup
from perl.stages.reward_rows import training_rows


def try_reward(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest answers."""
    settings, rows = session.recipe.reward, training_rows(session)
    assert settings is not None
    trained = setup(session)
    with reward_trainer(session, rows, steps=session.trial.steps) as trainer:
        if settings.epochs > 1 and not session.trial.abridged:  # a cache of fake tensors could not be read
            trainer.cache_lower_layers(rows)
        return session.take_steps(trainer, trained)
