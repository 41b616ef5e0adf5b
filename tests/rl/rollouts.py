"""A rollout of four completions, of which tests change the parts that matter to them."""

from dataclasses import replace
from typing import Any

import torch

from perl.data.records import Prompt
from perl.rl.rollout import Rollout

MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False]])


def rollout(values: torch.Tensor | None = None, each: int = 2, **changes: Any) -> Rollout:
    """Return `each` completions per prompt; policy and reference have equal log-probs."""
    ones_BL = torch.cat([torch.ones(4, 1).bool(), MASK], 1)
    made = Rollout(
        ids_BL=ones_BL.long(),
        mask_BL=ones_BL,
        prompt_lengths=[1] * 4,
        completion_lengths=MASK.sum(1).tolist(),
        ended_B=torch.ones(4).bool(),
        sampler_log_probs_BT=torch.zeros(4, 2),
        prompts=[Prompt((), "")] * 4,
        groups=[row // each for row in range(4)],
        texts=[""] * 4,
        rewards_B=torch.zeros(4),
        reward_parts={},
        policy_log_probs_BT=torch.zeros(4, 2),
        reference_log_probs_BT=torch.zeros(4, 2),
        values_BT=values,
    )
    return replace(made, **changes)
