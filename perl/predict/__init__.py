"""Prediction of a recipe's cost: trials of its stages for a few steps, on real weights or fake tensors."""

from perl.predict.memory import Memory, Traced, changed, predict, trace, weight_sizes
from perl.predict.stages import TRY
from perl.predict.subject import Subject, read_subject
from perl.predict.trial import Trial, TrialSession, Tried, trial_session

__all__ = [
    "TRY",
    "Memory",
    "Subject",
    "Traced",
    "Trial",
    "TrialSession",
    "Tried",
    "changed",
    "predict",
    "read_subject",
    "trace",
    "trial_session",
    "weight_sizes",
]
