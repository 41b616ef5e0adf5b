"""Division of completions into micro-batches of rows of similar length, without columns of padding alone."""

from collections.abc import Iterator
from typing import TypeVar

from perl.backbones.padding import BUCKET
from perl.rl.samplers.base import Samples

S = TypeVar("S", bound=Samples)


def micro_batches(samples: Samples, size: int) -> Iterator[list[int]]:
    """Yield row numbers, with rows of one prompt adjacent and prompts and rows of similar length together."""
    lengths = [sum(both) for both in zip(samples.prompt_lengths, samples.completion_lengths, strict=True)]
    groups = samples.groups or range(len(lengths))
    longest: dict[int, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    order = sorted(range(len(lengths)), key=lambda row: (longest[groups[row]], groups[row], lengths[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def trim(samples: S, rows: list[int]) -> S:
    """Return these rows without columns that are padding in all of them; lengths are multiples of `BUCKET`."""
    total = samples.completion_length
    prompt = samples.ids_BL.shape[1] - total
    longest_prompt = max(samples.prompt_lengths[row] for row in rows)
    longest_completion = max(samples.completion_lengths[row] for row in rows)
    start = prompt - min(prompt, -(-longest_prompt // BUCKET) * BUCKET)
    length = min(total, -(-longest_completion // BUCKET) * BUCKET)
    return samples.take(rows, slice(start, prompt + length), length)
