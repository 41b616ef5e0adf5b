"""The reward that RL trains on: the weighted sum of one or several named sources.

Axis letter: B completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl.data.records import Prompt
from perl.rl.rewards.base import RewardSource
from perl.rl.rewards.model import RewardModel
from perl.rl.rewards.server import ServedModel
from perl.rl.samplers.base import Samples


@dataclass(frozen=True)
class Scores:
    """Raw rewards of completions, fp64 (B); normalised later, once those of all processes are gathered."""

    total_B: Tensor
    """The weighted sum of the parts."""
    parts: dict[str, Tensor]
    """The sources' rewards by name, without the weights."""


class CombinedReward:
    """Reward sources and their weights. If several have the same name, the second becomes `NAME_2` and so on."""

    def __init__(self, parts: Sequence[tuple[RewardSource, float]]) -> None:
        self._parts = dict[str, tuple[RewardSource, float]]()
        for source, weight in parts:
            name, count = source.name, 1
            while name in self._parts:
                count += 1
                name = f"{source.name}_{count}"
            self._parts[name] = source, weight

    @property
    def models(self) -> list[RewardModel]:
        """The parts that are models of the reward stage."""
        return [source for source, _ in self._parts.values() if isinstance(source, RewardModel)]

    @property
    def served(self) -> dict[str, str]:
        """The hashes of the weights that servers score with, as far as they are known."""
        sources = ((name, source) for name, (source, _) in self._parts.items() if isinstance(source, ServedModel))
        return {f"{name}_weights": source.weights_sha256 for name, source in sources if source.weights_sha256}

    @property
    def rules(self) -> list[str]:
        """The names of the parts that are rules."""
        return [name for name, (source, _) in self._parts.items() if source.is_rule]

    def __call__(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> Scores:
        """Return the rewards of completions.

        Raises:
            UserError: a source fails, see `RewardSource`.
        """
        parts, weighted = dict[str, Tensor](), list[Tensor]()
        for name, (source, weight) in self._parts.items():
            rewards = source(prompts, samples, texts)
            parts[name] = torch.tensor(rewards, dtype=torch.float64, device=samples.ids_BL.device)
            weighted.append(weight * parts[name])
        return Scores(torch.stack(weighted).sum(0), parts)
