"""SFT tried: the stage's own setup and trainer."""

from perl.predict.trial import TrialSession, Tried
from perl.stages.sft import setup, sft_trainer, tokenized


def try_sft(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest demonstrations."""
    rows = tokenized(session, session.train.demonstrations)
    trained = setup(session)
    with sft_trainer(session, rows, steps=session.trial.steps) as trainer:
        return session.take_steps(trainer, trained)
