"""Scores of a run's reward model with any number of members.

Axis letters: M members, N rows.
"""

from collections.abc import Sequence

import numpy as np

from perl.backbones.tokens import Tokens
from perl.measure.bootstrap import Floats
from perl.measure.ensemble import disagreement, ensemble_scores
from perl.rl.rewards.model import score_rows
from perl.stages.session import Session


def run_member_scores(session: Session, rows: Sequence[Tokens], micro_batch_size: int = 32) -> Floats:
    """Return each member's scores (M, N) of rows; members that are not in memory are loaded."""
    for role in session.reward_members:
        session.load(role)
    pad_id = session.base.chat.pad_id
    scores: Floats = score_rows(session.roles, session.reward_members, rows, pad_id, micro_batch_size).numpy()
    return scores


def run_scores(session: Session, rows: Sequence[Tokens], micro_batch_size: int = 32) -> Floats:
    """Return the scores (N) of all members as one model."""
    return ensemble_scores(run_member_scores(session, rows, micro_batch_size), scores_are_log_odds(session))


def run_disagreement(session: Session, scores_MN: Floats) -> Floats:
    """Return the members' disagreement on each row (N), see `disagreement`.

    Bradley-Terry determines a member's scores only up to a constant, so for a model of pairs each member's mean
    over the training rows is subtracted first.
    """
    return disagreement(scores_MN - zero_points(session)[:, None], scores_are_log_odds(session))


def zero_points(session: Session) -> Floats:
    """Return the zero point of each member's scores, (M): 0 for log-odds, else the mean over the training rows."""
    if scores_are_log_odds(session):
        return np.zeros(len(session.reward_members))
    return np.array([session.stamp(role).reward_mean for role in session.reward_members])


def scores_are_log_odds(session: Session) -> bool:
    """Return whether the reward model's scores are the log-odds of a thumb up."""
    assert session.recipe.reward is not None
    return session.recipe.reward.loss != "pairs"
