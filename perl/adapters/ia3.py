"""(IA)³: a learned factor on each output of a layer, or on each input (arXiv 2205.05638).

Letters: N tokens, I inputs and O outputs of a layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft import IA3Config
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from perl.adapters.peft_kind import PeftKind
from perl.adapters.targets import choose
from perl.errors import UserError
from perl.private.peft import IA3Layer
from perl.recipe.adapter import Ia3Settings


class Ia3(PeftKind):
    """(IA)³ with peft's layers; factors are on the inputs of the MLP's last layer if peft's table names it."""

    settings_type = Ia3Settings
    mark = "ia3_"
    rate_factor = 25.0
    layer_type = IA3Layer
    rescales = True
    settings: Ia3Settings

    def peft_config(self) -> IA3Config:
        """See `PeftKind`."""
        model_type = self.lm.config.get_text_config().model_type
        feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, [])
        targets: str | list[str] = self.settings.targets
        if targets == "published":
            names = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model_type)
            if names is None:
                raise UserError(
                    f"peft has no default targets of (IA)³ for models of type {model_type}",
                    where="adapter.targets",
                    remedy="Set it to attention, all-linear or names of modules.",
                )
            everything = choose(self.lm, "all-linear", self.settings.layers, self.section)
            targets = [name for name in everything if name.endswith(tuple(f".{one}" for one in names))]
        chosen = list(self.linear_targets(targets, self.settings.layers))
        return IA3Config(
            target_modules=chosen,
            feedforward_modules=[one for one in chosen if one.endswith(tuple(f".{end}" for end in feedforward))],
            fan_in_fan_out=self._transposed,
        )

    def starting_value(self, name: str) -> float:
        """Return one, the initial value of a factor."""
        return 1.0

    @torch.no_grad()
    def added(self, layer: Any, role: str, x_NI: Tensor) -> Tensor:
        """Compute it by definition, with the base's forward: its weight cannot be read during sampling."""
        base = layer.get_base_layer()
        change: Tensor = layer.ia3_l[role].float().flatten() - 1
        if not layer.is_feedforward:
            return change * self._plain(base, x_NI)
        y_NO = self._plain(base, change * x_NI)
        return y_NO if base.bias is None else y_NO - base.bias.float()

    def _plain(self, base: Any, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = base(x_NI.to(self.lm.dtype))
        return y_NO.float()

    def delta(self, layer: Any, role: str) -> Tensor:
        """Return the weight times (factors - 1)."""
        factors: Tensor = layer.ia3_l[role].float()  # (1, I) or (O, 1)
        weight: Tensor = dequantize_module_weight(layer.get_base_layer())
        return (factors.T if self._transposed else factors).sub(1) * weight.float()

    @torch.no_grad()
    def deltas(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the changes of weights, and of biases where outputs have factors."""
        yield from super().deltas(role)
        for name, layer in self.named_layers():
            bias = layer.get_base_layer().bias
            if bias is not None and not layer.is_feedforward:
                yield f"{name}.bias", (layer.ia3_l[role].float().flatten() - 1) * bias.float()
