"""MiSS: each output adds a learned mix of r sums, each over every r-th input (arXiv 2409.15371).

Letters: I inputs and O outputs of a layer, R rank.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import MissConfig
from torch import Tensor

from perl.adapters.peft_kind import PeftKind
from perl.errors import UserError
from perl.private.peft import MissLayer
from perl.recipe.adapter import MissSettings

RATE_SIZE = 16
"""The rank at which MiSS's best learning rate was measured: LoRA's."""


class Miss(PeftKind):
    """MiSS with peft's layers, in its original form."""

    settings_type = MissSettings
    mark = "miss_"
    layer_type = MissLayer
    in_peft: ClassVar[Mapping[str, str]] = {"rank": "r"}
    meaning = ("init_weights",)
    settings: MissSettings

    @classmethod
    def rate_factor_at(cls, settings: MissSettings) -> float:
        """See `AdapterKind`: Adam moves an output by the rate times R sums of I / R inputs: √(R I)."""
        return cls.rate_factor * min(1.0, math.sqrt(RATE_SIZE / settings.rank))

    def peft_config(self) -> MissConfig:
        """See `PeftKind`."""
        wanted = self.linear_targets(self.settings.targets, self.settings.layers)
        narrowest = min(inputs for inputs, _ in wanted.values())
        if self.settings.rank > narrowest:
            raise UserError(
                f"a layer that gets an adapter has only {narrowest} inputs, too few for {self.settings.rank} sums",
                where="adapter.rank",
                remedy=f"Give at most {narrowest}; 64 is peft's default.",
            )
        return MissConfig(r=self.settings.rank, target_modules=list(wanted))

    def starting_value(self, name: str) -> float:
        """Return zero for all parameters."""
        return 0.0

    def rank_axis(self, name: str, parameter: Tensor) -> int:
        """Return that of the sums, each of which has its mix."""
        return 0

    def delta(self, layer: Any, role: str) -> Tensor:
        """Return each output's mix, repeated along its inputs."""
        block_RO: Tensor = layer.miss_block[role].float()
        return block_RO.T[:, torch.arange(layer.in_features, device=block_RO.device) % block_RO.shape[0]]
