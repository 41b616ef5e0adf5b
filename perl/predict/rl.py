"""RL tried: the stage's own loop, told by `session.trial` to evaluate and write nothing."""

from dataclasses import fields

from perl import results
from perl.predict.trial import TrialSession, Tried
from perl.stages.rl import train_rl


def try_rl(session: TrialSession) -> Tried:
    """Take the trial's steps on the longest prompts, with completions as long as they can get."""
    result = train_rl(session)
    assert isinstance(result, results.Tried)
    return Tried(**{field.name: getattr(result, field.name) for field in fields(Tried)})
