"""Base class of reward sources: they are called with prompts and completions and return one number for each."""

import inspect
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from perl.data.records import Prompt
from perl.errors import UserError
from perl.rl.rewards.limits import result
from perl.system.progress import counted
from perl.system.python_file import described, failed_line

if TYPE_CHECKING:  # a plugin with a custom reward is read without torch
    from perl.measure.ensemble import Combine
    from perl.rl.rewards.model import RewardModel
    from perl.rl.samplers.base import Samples

ANOTHER_OUT = "If RL has already taken steps with the old rewards, use another --out."
FLOATS = "Return a list of floats."
NOT_NONE = "Where TRL's functions return None, return 0, which is what TRL then adds."
LARGEST_REWARD = 1e30
"""Largest absolute value. Rewards are kept in fp32, which ends at 3e38, and squared for their variance."""


@dataclass(frozen=True)
class RewardServers:
    """A recipe's settings of reward servers."""

    urls: tuple[str, ...]
    """Without a trailing slash; several URLs are replicas of one another."""
    model: str
    """The servers' name of the reward model."""
    probability: bool
    """Whether the reward is the sigmoid of the score, if no stamp says."""
    time_limit: float
    """Time limit of a request, in seconds."""
    patience: float
    """Seconds to wait for a server that does not answer."""
    in_flight: int
    """Number of simultaneous requests."""
    mismatch_limit: float | None
    """Allowed difference of two scores of the same row; None: by the base's dtype."""


@dataclass(frozen=True)
class RewardContext:
    """The context in which a source is created."""

    prompts: Sequence[Prompt]
    """All prompts with which it will be called."""
    model: "Callable[[Sequence[int] | None, Combine, float], RewardModel]"
    """Loads the reward stage's model, given its members (None: all), how they are combined, and `std_weight`."""
    model_of: "Callable[[str], RewardSource]"
    """Loads the reward model of the run in a folder."""
    served: "Callable[[RewardServers], RewardSource]"
    """Returns the reward model on servers."""


class RewardSource(ABC):
    """A part of the reward.

    Raises:
        UserError: when called: the source raised an exception, returned a wrong number of scores, or a score that
            is not finite or exceeds `LARGEST_REWARD`.
    """

    name: str
    """NAME in `reward/NAME` in metrics.jsonl and in the report."""
    is_rule: ClassVar[bool] = False
    """Whether 1 means correct and 0 wrong; if so, pass@k is measured."""
    runs_user_code: ClassVar[bool] = True
    """Whether a failure is the user's; if not, exceptions are raised as they are, and rewards are not checked."""
    title: ClassVar[str] = "the reward"
    """Its name in messages."""

    @abstractmethod
    def rewards(self, prompts: Sequence[Prompt], samples: "Samples", texts: Sequence[str]) -> Sequence[float]:
        """Return a finite number for each completion.

        Args:
            prompts: the prompt of each completion.
            samples: the completions as tokens.
            texts: the completions as text.
        """

    @property
    def where(self) -> str:
        """The place that messages name."""
        return f"rl.reward {self.name}"

    @property
    def file(self) -> Path:
        """The Python file whose line is named if it raises."""
        return Path(inspect.getfile(type(self)))

    def __call__(self, prompts: Sequence[Prompt], samples: "Samples", texts: Sequence[str]) -> list[float]:
        """Return the checked rewards; arrays, tensors and booleans are accepted as numbers."""
        if not self.runs_user_code:
            return list(self.rewards(prompts, samples, texts))
        try:
            returned = result(self.rewards, prompts=prompts, samples=samples, texts=texts)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.title} failed: {described(error)}",
                where=failed_line(self.file, error),
                remedy="If the cause was temporary, run the same command again: it resumes from the last "
                f"checkpoint. Otherwise correct the function. {ANOTHER_OUT} No completion is scored 0 because "
                "of a failure.",
            ) from error
        return self._check(returned, texts)

    def _check(self, returned: Any, texts: Sequence[str]) -> list[float]:
        """Return the numbers of a list of scores, one for each text."""
        count = len(texts)
        try:
            scores = None if isinstance(returned, str | bytes | Mapping | Set) else list(returned)
        except TypeError:  # not iterable
            scores = None
        if scores is None:
            raise self._misfit(count, f"it returned {type(returned).__name__} {reprlib.repr(returned)}")
        if len(scores) != count:
            raise self._misfit(count, f"it returned {len(scores)} of {count}: {reprlib.repr(scores)}")
        numbers = [_number(score) for score in scores]
        for row, (score, number) in enumerate(zip(scores, numbers, strict=True)):
            if not math.isfinite(number):
                what = f"score {row} is {reprlib.repr(score)}, for {reprlib.repr(texts[row])}"
                raise self._misfit(count, what, NOT_NONE if score is None else FLOATS)
            if abs(number) > LARGEST_REWARD:
                raise UserError(
                    f"score {row} of {self.title} is {number:g}; its absolute value may be at most "
                    f"{LARGEST_REWARD:g}",
                    where=self.where,
                    remedy="Divide all rewards by a constant: training scales them to unit variance in any case.",
                )
        return numbers

    def _misfit(self, count: int, what: str, remedy: str = FLOATS) -> UserError:
        return UserError(
            f"{self.title} must return {counted(count, 'finite number')}, one per completion; {what}",
            where=self.where,
            remedy=f"{remedy} {ANOTHER_OUT}",
        )


def _number(score: Any) -> float:
    """Return a score as a number; NaN if it is not one, such as any string."""
    try:
        return math.nan if isinstance(score, str | bytes) else float(score)
    except OverflowError:  # an integer beyond the range of floats
        return math.inf if score > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return math.nan
