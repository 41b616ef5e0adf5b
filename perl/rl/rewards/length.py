"""A reward for the length of completions."""

from collections.abc import Sequence

from perl.data.records import Prompt
from perl.rl.rewards.base import RewardSource
from perl.rl.samplers.base import Samples


class Length(RewardSource):
    """Minus the distance of a completion's length from the target; without a target, the length.

    Args:
        target: in tokens, including the end token if there is one.
    """

    name = "length"

    def __init__(self, target: int | None) -> None:
        self._target = target

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        if self._target is None:
            return [float(length) for length in samples.completion_lengths]
        return [-float(abs(length - self._target)) for length in samples.completion_lengths]
