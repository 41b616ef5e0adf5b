"""A rollout: completions drawn by the policy, with everything that is known of them before it learns.

Axis letters: B completions, L = P + T positions of prompt and completion, T completion positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perl.data.records import Prompt
from perl.parallel.processes import Processes
from perl.rl.samplers.base import Samples


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts with their tokens."""

    prompts: list[Prompt]
    ids: list[list[int]]
    groups: list[int]
    """Completions of prompts of one group are compared with one another."""
    cut: int = 0
    """How many were too long."""

    def take(self, chosen: Sequence[int]) -> "EncodedPrompts":
        """The prompts at these places."""
        return EncodedPrompts(
            prompts=[self.prompts[place] for place in chosen],
            ids=[self.ids[place] for place in chosen],
            groups=[self.groups[place] for place in chosen],
        )

    def repeat(self, each: int) -> "EncodedPrompts":
        """Each prompt so often, side by side: a group."""
        places = [place for place in range(len(self)) for _ in range(each)]
        return replace(self.take(places), groups=places)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Rollout(Samples):
    """Completions, their rewards, and what each role says of them; all fp32 but the rewards.

    Log-probs are named by who computed them: the sampler as it drew, the policy before this step's first update
    (π_old), the reference. All are 0 in the padding.
    """

    prompts: list[Prompt]
    groups: list[int]
    """As in `Samples`; completions of one prompt stand side by side."""
    texts: list[str]
    rewards_B: Tensor
    """As the reward gave them, fp64: normalised later, when those of all processes are together."""
    reward_parts: dict[str, Tensor]
    """By name what the rewards are the weighted sum of, (B), fp64; empty where they have no parts."""
    policy_log_probs_BT: Tensor
    """The tensor of the sampler's, where the sampler computes as the policy does."""
    reference_log_probs_BT: Tensor
    values_BT: Tensor | None
    """The critic's value of the state before each token; None without a critic."""

    @property
    def group_size(self) -> int:
        """Completions of each prompt."""
        return len(self.groups) // len(set(self.groups))

    def gather(self, processes: Processes, prompts: EncodedPrompts) -> "Rollout":
        """The rollout of all processes in the order of the prompts, the shared blocks' states left out.

        Args:
            prompts: of all processes.
        """
        if processes.count == 1:
            return self
        columns = processes.all_reduce_max(self.ids_BL.shape[1])
        wider = vars(replace(self, lower_hidden_BLD=None).widened(columns))
        local: dict[str, Any] = wider | {"prompts": [], "groups": []}
        parts = processes.all_gather({name: _on_host(value) for name, value in local.items()})
        joined = Rollout.joined(parts, len(prompts), self.ids_BL.device)
        return Rollout(**joined | {"prompts": prompts.prompts, "groups": prompts.groups})

    def widened(self, columns: int) -> "Rollout":
        """With so many columns: prompts are padded on the left."""
        more = columns - self.ids_BL.shape[1]
        lower = self.lower_hidden_BLD
        return replace(
            self,
            ids_BL=F.pad(self.ids_BL, (more, 0)),
            mask_BL=F.pad(self.mask_BL, (more, 0)),
            lower_hidden_BLD=None if lower is None else F.pad(lower, (0, 0, more, 0)),
        )

    @classmethod
    def joined(cls, parts: Sequence[dict[str, Any]], total: int, device: torch.device) -> dict[str, Any]:
        """The fields of several rollouts of equal width as one's, of the first `total` rows."""
        return {field.name: _joined([part[field.name] for part in parts], total, device) for field in fields(cls)}


def _on_host(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_host(one) for name, one in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def _joined(parts: list[Any], total: int, device: torch.device) -> Any:
    """The values of all processes as one, of the first `total` rows: the last may have been dealt twice."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[:total].to(device)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts], total, device) for name in first}
    return None if first is None else [row for part in parts for row in part][:total]
