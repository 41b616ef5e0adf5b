"""VeRA: learned vectors on two random matrices that all layers and roles share (arXiv 2310.11454).

y = W x + b * B (d * A x): A and B are drawn from the recipe's seed and never trained, d and b are learned. Each
layer uses the part of the matrices that matches its width.
"""

import warnings
from collections.abc import Mapping
from typing import ClassVar

from peft import VeraConfig
from torch import Tensor

from perl.adapters.peft_kind import SharingKind
from perl.private.peft import HostDrawnVera, VeraLayer
from perl.recipe.adapter import VeraSettings


class Vera(SharingKind):
    """VeRA with peft's layers."""

    settings_type = VeraSettings
    mark = "vera_"
    rate_factor = 20.0
    layer_type = VeraLayer
    in_peft: ClassVar[Mapping[str, str]] = {"rank": "r", "projection_seed": "projection_prng_key"}
    tuner_type = HostDrawnVera
    settings: VeraSettings

    def peft_config(self) -> VeraConfig:
        """See `PeftKind`. The matrices are not saved, but drawn again when an adapter is loaded."""
        settings = self.settings
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save vera_A")  # its seed is in the file
            return VeraConfig(
                r=settings.rank,
                projection_prng_key=settings.projection_seed,
                save_projection=False,
                target_modules=list(self.linear_targets(settings.targets, settings.layers)),
                fan_in_fan_out=self._transposed,
            )

    def _inject_layers(self, role: str) -> None:
        super()._inject_layers(role)
        for matrices in (self._tuner.vera_A, self._tuner.vera_B):  # peft casts them to the base's dtype
            matrices[role] = matrices[self._first].float()

    def fixed(self, role: str) -> Mapping[str, Tensor]:
        """Return the random matrices."""
        return {"base_model.vera_A": self._tuner.vera_A[role], "base_model.vera_B": self._tuner.vera_B[role]}

    def starting_value(self, name: str) -> float | None:
        """Return zero for the outer vectors, and peft's constant for the inner ones."""
        return 0.0 if "lambda_b" in name else float(self.config.d_initial)
