"""VeRA: learned vectors around two random matrices that all layers and roles share (arXiv 2310.11454).

y = W x + b * B (d * A x): A and B are drawn from the recipe's seed and never trained, d and b are learned. Layers
take as much of the matrices as they are wide.
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
    """VeRA by peft."""

    settings_type = VeraSettings
    mark = "vera_"
    rate_factor = 20.0
    layer_type = VeraLayer
    in_peft: ClassVar[Mapping[str, str]] = {"rank": "r", "projection_seed": "projection_prng_key"}
    settings: VeraSettings
    _tuner: HostDrawnVera | None = None
    """Has the random matrices."""

    def peft_config(self) -> VeraConfig:
        """See `PeftKind`. The matrices are not saved: wherever an adapter is loaded they are drawn again."""
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

    def _put_in(self, role: str) -> None:
        """The first role's injection draws the matrices; all others are given the same."""
        if self._tuner is None:
            self._tuner, self._first = HostDrawnVera(self.lm, self.config, role), role
        else:
            self._tuner.peft_config[role] = self.config
            self._tuner.inject_adapter(self.lm, role)
        for matrices in (self._tuner.vera_A, self._tuner.vera_B):  # peft has cast them to the base's dtype
            matrices[role] = matrices[self._first].float()

    def remove(self) -> None:
        """Take the layers out, and forget the matrices."""
        super().remove()
        self._tuner = None

    def fixed(self, role: str) -> Mapping[str, Tensor]:
        """The random matrices."""
        assert self._tuner is not None
        return {"base_model.vera_A": self._tuner.vera_A[role], "base_model.vera_B": self._tuner.vera_B[role]}

    def starting_value(self, name: str) -> float | None:
        """The outer vectors begin at zero, the inner ones at peft's constant."""
        return 0.0 if "lambda_b" in name else float(self.config.d_initial)
