"""What a source of rewards is: it is called with prompts and their completions, and gives a number for each."""

import math
import reprlib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from perl.data.records import Prompt
from perl.errors import UserError
from perl.system.progress import counted

if TYPE_CHECKING:  # a plugin with a reward of its own is read without torch
    from perl.measure.ensemble import Combine
    from perl.rl.rewards.model import RewardModel
    from perl.rl.samplers.base import Samples

LARGEST_REWARD = 1e30
"""In size. Rewards are kept in fp32, which ends at 3e38, and their spread is a sum of squares."""


@dataclass(frozen=True)
class RewardServers:
    """What a recipe says of servers that score."""

    urls: tuple[str, ...]
    """Without a slash at the end; several are replicas of one another."""
    model: str
    """What they call the reward model."""
    probability: bool
    """Whether the reward is the sigmoid of the score, where no stamp says."""
    time_limit: float
    """Seconds that a request may take."""
    patience: float
    """Seconds in which a server that does not answer may come back."""
    in_flight: int
    """Requests at once."""
    mismatch_limit: float | None
    """Of two scores of one row; None: by the base's dtype."""


@dataclass(frozen=True)
class RewardContext:
    """What a source may be made from."""

    prompts: Sequence[Prompt]
    """All that it will be called with."""
    model: "Callable[[Sequence[int] | None, Combine, float], RewardModel]"
    """The reward stage's model, loaded when it is asked for: of these members, None being all, combined so, with
    this `std_weight`."""
    model_of: "Callable[[str], RewardSource]"
    """The reward model of the run in a folder."""
    served: "Callable[[RewardServers], RewardSource]"
    """The model that servers compute."""


class RewardSource(ABC):
    """A part of the reward.

    Raises:
        UserError: when called, an exception inside, another count of scores, or a score that is no finite number
            of at most `LARGEST_REWARD`.
    """

    name: str
    """`reward/NAME` in metrics.jsonl and in the report."""
    is_rule: ClassVar[bool] = False
    """Whether 1 is right and 0 wrong: then pass@k is measured."""
    title: ClassVar[str] = "the reward"
    """What messages call it."""

    @abstractmethod
    def rewards(self, prompts: Sequence[Prompt], samples: "Samples", texts: Sequence[str]) -> Sequence[float]:
        """A finite number for each completion.

        Args:
            prompts: of each completion.
            samples: the completions as tokens.
            texts: the completions as text.
        """

    @property
    def where(self) -> str:
        """What messages name as the place."""
        return f"rl.reward {self.name}"

    def __call__(self, prompts: Sequence[Prompt], samples: "Samples", texts: Sequence[str]) -> list[float]:
        """The rewards, checked; arrays, tensors and booleans count as numbers do."""
        try:
            returned = self.rewards(prompts, samples, texts)
        except (Exception, SystemExit) as error:  # the user's own code
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{self.title} failed: {type(error).__name__}: {error}",
                where=f"{frame.filename}:{frame.lineno}",
                remedy="Correct the function, and run it into another --out: what it has trained so far is of the "
                "function as it was. No completion is scored 0 for a failure.",
            ) from error
        return self._check(returned, len(texts))

    def _check(self, returned: Any, count: int) -> list[float]:
        """The numbers of a list of so many."""
        try:
            scores = None if isinstance(returned, str | bytes | Mapping) else list(returned)
        except TypeError:  # nothing that has items
            scores = None
        if scores is None:
            raise self._misfit(count, f"it returned {type(returned).__name__} {reprlib.repr(returned)}")
        if len(scores) != count:
            raise self._misfit(count, f"it returned {len(scores)} of {count}: {reprlib.repr(scores)}")
        numbers = [_number(score) for score in scores]
        for row, (score, number) in enumerate(zip(scores, numbers, strict=True)):
            if not math.isfinite(number):
                raise self._misfit(count, f"score {row} is {reprlib.repr(score)}")
            if abs(number) > LARGEST_REWARD:
                raise UserError(
                    f"score {row} of {self.title} is {number:g}; at most {LARGEST_REWARD:g} in size is supported",
                    where=self.where,
                    remedy="Divide all rewards by a constant: training scales them to unit spread in any case.",
                )
        return numbers

    def _misfit(self, count: int, what: str) -> UserError:
        return UserError(
            f"{self.title} must return {counted(count, 'finite number')}, one a completion; {what}",
            where=self.where,
            remedy="Return a list of floats.",
        )


def _number(score: Any) -> float:
    """A score as a number; NaN where it is none, as a string is, whatever it says."""
    try:
        return math.nan if isinstance(score, str | bytes) else float(score)
    except OverflowError:  # a whole number that no float holds
        return math.inf if score > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return math.nan
