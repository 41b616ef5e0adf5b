"""Rows of a rollout, and the merging of several processes' rollouts."""

from collections.abc import Sequence
from typing import Any

import torch

from perl.data.records import Prompt
from perl.parallel.processes import Processes
from perl.rl.batches import trim
from perl.rl.rollout import EncodedPrompts, Rollout

LENGTHS = ((3, 2), (20, 17), (5, 1))


def rollout(columns: int = 32, rows: Sequence[int] = (0, 1, 2)) -> Rollout:
    """Return prompts of 3, 20 and 5 tokens in `columns` columns, with completions of 2, 17 and 1 in 24."""
    mask_BL = torch.zeros(len(rows), columns + 24, dtype=torch.bool)
    for place, row in enumerate(rows):
        prompt, completion = LENGTHS[row]
        mask_BL[place, columns - prompt : columns + completion] = True
    log_probs_BT = -torch.rand(len(rows), 24)
    return Rollout(
        ids_BL=mask_BL * torch.tensor(rows)[:, None],
        mask_BL=mask_BL,
        prompt_lengths=[LENGTHS[row][0] for row in rows],
        completion_lengths=[LENGTHS[row][1] for row in rows],
        ended_B=torch.ones(len(rows)).bool(),
        sampler_log_probs_BT=log_probs_BT,
        lower_hidden_BLD=torch.rand(len(rows), columns + 24, 2),
        prompts=[Prompt((), str(row)) for row in rows],
        groups=list(rows),
        texts=[str(row) for row in rows],
        rewards_B=torch.tensor(rows).double(),
        reward_parts={"length": torch.tensor(rows).double()},
        policy_log_probs_BT=log_probs_BT,
        reference_log_probs_BT=-torch.rand(len(rows), 24),
        values_BT=None,
    )


def test_rows_lose_the_columns_that_are_padding_in_all_of_them() -> None:
    whole = rollout()
    part = trim(whole, [2, 0])
    assert (part.ids_BL.shape, part.completion_length) == ((2, 32), 16)  # of 32 and 24, in buckets of 16
    assert torch.equal(part.reference_log_probs_BT, whole.reference_log_probs_BT[[2, 0], :16])
    assert torch.equal(part.lower_hidden_BLD, whole.lower_hidden_BLD[[2, 0], 16:48])  # type: ignore[index]
    assert [len(ids) for ids in part.prompt_ids() + part.completions()] == [5, 3, 1, 2]
    assert (part.texts, part.groups, part.reward_parts["length"].tolist()) == (["2", "0"], [2, 0], [2.0, 0.0])
    assert part.policy_log_probs_BT is part.sampler_log_probs_BT, "one tensor stays one"


def test_prompts_repeated_are_groups() -> None:
    prompts = EncodedPrompts([Prompt((), name) for name in "ab"], [[1], [2]], [0, 1])
    asked = prompts.take([1, 0, 1]).repeat(2)  # a prompt that is asked twice in a step is two groups
    assert asked.ids == [[2], [2], [1], [1], [2], [2]]
    assert asked.groups == [0, 0, 1, 1, 2, 2]


class _Both(Processes):
    """This process and a simulated second one with another rollout."""

    def __init__(self, other: Rollout) -> None:
        super().__init__(rank=0, count=2)
        object.__setattr__(self, "_other", other)

    def all_gather(self, value: Any) -> list[Any]:
        return [value, vars(self._other) | {"lower_hidden_BLD": None}]  # type: ignore[attr-defined]

    def all_reduce_max(self, number: int) -> int:
        return max(number, 32 + 24)


def test_rollouts_of_two_processes_are_one_in_the_order_of_the_prompts() -> None:
    """Three prompts are sharded over two processes, and the second one has the last prompt twice."""
    mine, other = rollout(16, [0, 2]), rollout(32, [1, 1])
    prompts = EncodedPrompts([Prompt((), name) for name in "abc"], [[0], [2], [1]], [7, 8, 9])
    both = mine.gather(_Both(other), prompts)
    assert both.ids_BL.shape == (3, 32 + 24)
    assert both.texts == ["0", "2", "1"]
    assert both.rewards_B.tolist() == both.reward_parts["length"].tolist() == [0.0, 2.0, 1.0]
    assert both.mask_BL.sum(1).tolist() == [5, 6, 37]
    assert (both.prompts, both.groups, both.lower_hidden_BLD) == (prompts.prompts, [7, 8, 9], None)
    assert mine.gather(Processes(), prompts) is mine
