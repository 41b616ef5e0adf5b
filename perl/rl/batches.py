"""A rollout in parts: micro-batches of rows of like length, without the columns that are padding in all of them.

Axis letters: B answers, L = P + T positions of prompt and answer, T answer positions, D hidden.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from perl.backbones.padding import BUCKET
from perl.rl.samplers.local import Samples


class Batch(NamedTuple):
    """Some rows of a rollout, as `Roles` reads them."""

    ids_BL: Tensor
    mask_BL: Tensor
    completion_length: int
    """T, the columns at the right end that hold the answers."""
    lower_hidden_BLD: Tensor | None
    """What the shared blocks make of them, if that was computed."""

    @property
    def completion_mask_BT(self) -> Tensor:
        """True for the answers' tokens."""
        return self.mask_BL[:, -self.completion_length :]


def micro_batches(samples: Samples, size: int) -> Iterator[list[int]]:
    """Row numbers, rows of like length together; of abridged samples two batches, as many as decide the peak."""
    lengths = [sum(both) for both in zip(samples.prompt_lengths, samples.completion_lengths, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    order = order[-2 * size :] if samples.abridged else order
    for start in range(0, len(order), size):
        yield order[start : start + size]


def trim(samples: Samples, rows: list[int]) -> Batch:
    """These rows without the columns that are padding in all of them; lengths are multiples of `BUCKET`."""
    total = samples.completion_length
    prompt = samples.ids_BL.shape[1] - total
    longest_prompt = max(samples.prompt_lengths[row] for row in rows)
    longest_answer = max(samples.completion_lengths[row] for row in rows)
    start = prompt - min(prompt, -(-longest_prompt // BUCKET) * BUCKET)
    length = min(total, -(-longest_answer // BUCKET) * BUCKET)
    window = slice(start, prompt + length)
    lower_hidden_BLD = samples.lower_hidden_BLD[rows, window] if samples.lower_hidden_BLD is not None else None
    return Batch(samples.ids_BL[rows, window], samples.mask_BL[rows, window], length, lower_hidden_BLD)
