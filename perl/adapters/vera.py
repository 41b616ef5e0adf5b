"""VeRA: learned vectors on two random matrices that all layers and roles share (arXiv 2310.11454).

y = W x + b * B (d * A x): A and B are drawn from the recipe's seed and never trained, d and b are learned. Each
layer uses the part of the matrices that matches its width.
"""

import warnings
from collections.abc import Mapping
from typing import ClassVar

from peft import VeraConfig
from torch import Tensor

from perl.adapters.peft_kind import PeftKind
from perl.private.peft import HostDrawnVera, VeraLayer
from perl.recipe.adapter import VeraSettings


class Vera(PeftKind):
    """VeRA with peft's layers."""

    settings_type = VeraSettings
    mark = "vera_"
    rate_factor = 20.0
    layer_type = VeraLayer
    in_peft: ClassVar[Mapping[str, str]] = {"rank": "r", "projection_seed": "projection_prng_key"}
    settings: VeraSettings
    _tuner: HostDrawnVera | None = None
    """The tuner, which holds the random matrices."""

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
        """Draw the matrices for the first role, and share them with all others."""
        if self._tuner is None:
            self._tuner, self._first = HostDrawnVera(self.lm, self.config, role), role
        else:
            self._tuner.peft_config[role] = self.config
            self._tuner.inject_adapter(self.lm, role)
        for matrices in (self._tuner.vera_A, self._tuner.vera_B):  # peft casts them to the base's dtype
            matrices[role] = matrices[self._first].float()

    def remove(self) -> None:
        """Remove the layers and drop the matrices."""
        super().remove()
        self._tuner = None

    def fixed(self, role: str) -> Mapping[str, Tensor]:
        """Return the random matrices."""
        assert self._tuner is not None
        return {"base_model.vera_A": self._tuner.vera_A[role], "base_model.vera_B": self._tuner.vera_B[role]}

    def starting_value(self, name: str) -> float | None:
        """Return zero for the outer vectors, and peft's constant for the inner ones."""
        return 0.0 if "lambda_b" in name else float(self.config.d_initial)
