"""A rollout: completions sampled from the policy, with all that is computed of them before the update.

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
    """Prompts and their token ids."""

    prompts: list[Prompt]
    ids: list[list[int]]
    groups: list[int]
    """Group of each prompt; completions of one group are compared with one another."""
    cut: int = 0
    """Number of prompts that were too long and were truncated."""

    def take(self, chosen: Sequence[int]) -> "EncodedPrompts":
        """Return the prompts at these indices."""
        return EncodedPrompts(
            prompts=[self.prompts[place] for place in chosen],
            ids=[self.ids[place] for place in chosen],
            groups=[self.groups[place] for place in chosen],
        )

    def repeat(self, each: int) -> "EncodedPrompts":
        """Return each prompt `each` times, adjacent, as one group."""
        places = [place for place in range(len(self)) for _ in range(each)]
        return replace(self.take(places), groups=places)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Rollout(Samples):
    """Completions, their rewards, and each role's outputs for them; all fp32 except the rewards.

    Log-probs are named after their source: the sampler while sampling, the policy before this step's first update
    (π_old), the reference. All are 0 in the padding.
    """

    prompts: list[Prompt]
    groups: list[int]
    """As in `Samples`; completions of one prompt are adjacent."""
    texts: list[str]
    rewards_B: Tensor
    """Raw rewards, fp64; normalised later, once those of all processes are gathered."""
    reward_parts: dict[str, Tensor]
    """The unweighted parts of the rewards by name, (B), fp64; empty if they have no parts."""
    policy_log_probs_BT: Tensor
    """The same tensor as the sampler's, if the sampler is exact."""
    reference_log_probs_BT: Tensor
    values_BT: Tensor | None
    """The critic's value of the state before each token; None without a critic."""

    @property
    def group_size(self) -> int:
        """Completions per prompt."""
        return len(self.groups) // len(set(self.groups))

    def gather(self, processes: Processes, prompts: EncodedPrompts) -> "Rollout":
        """Return the rollout of all processes in the order of the prompts, without `lower_hidden_BLD`.

        Args:
            prompts: the prompts of all processes.
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
        """Return the rollout padded on the left to this many columns."""
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
        """Return the fields of several rollouts of equal width, concatenated and cut to the first `total` rows."""
        return {field.name: _joined([part[field.name] for part in parts], total, device) for field in fields(cls)}


def _on_host(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_host(one) for name, one in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def _joined(parts: list[Any], total: int, device: torch.device) -> Any:
    """Concatenate the values of all processes; keep the first `total` rows, as shards may repeat the last one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[:total].to(device)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts], total, device) for name in first}
    return None if first is None else [row for part in parts for row in part][:total]
