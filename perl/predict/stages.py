"""The trial of each stage."""

from collections.abc import Callable

from perl.predict.reward import try_reward
from perl.predict.rl import try_rl
from perl.predict.sft import try_sft
from perl.predict.trial import TrialSession, Tried
from perl.recipe import StageName

TRY: dict[StageName, Callable[[TrialSession], Tried]] = {"sft": try_sft, "reward": try_reward, "rl": try_rl}
