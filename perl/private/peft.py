"""The private interfaces of peft that PERL uses."""

from typing import Any

import torch
from peft import VeraConfig
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer, layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.miss import MissLayer
from peft.tuners.tinylora.layer import TinyLoraLayer
from peft.tuners.tinylora.model import TinyLoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.vera import VeraLayer, VeraModel
from peft.utils import transformers_weight_conversion

from perl.private.checked import need

need(layer, "ParamWrapper")
need(
    LoraLayer,
    "resolve_lora_variant",
    "adapter_layer_names",
    "other_param_names",
    "get_base_layer",
)
need(DoraLinearLayer, "get_weight_norm", "get_lora_weight")
need(BaseTuner, "inject_adapter")
need(BaseTunerLayer, "_active_adapter", "active_adapters")
need(VeraModel, "_init_vera_A_vera_B")
need(TinyLoraLayer, "_init_svd")
need(transformers_weight_conversion, "convert_peft_config_for_transformers")

ParamWrapper = layer.ParamWrapper
"""LoRA on a parameter of a module, such as the weights of experts."""


def set_active(layer: Any, names: list[str]) -> None:
    """Set the attribute that peft's forward reads; peft's `set_adapter` would also set `requires_grad`."""
    layer._active_adapter = names


class HostDrawnVera(VeraModel):
    """VeRA whose matrices are drawn on the CPU, where their generator is, whatever torch's default device."""

    def _init_vera_A_vera_B(self, config: VeraConfig, adapter_name: str) -> None:
        with torch.device("cpu"):
            super()._init_vera_A_vera_B(config, adapter_name)


class SharedDecomposition:
    """Mixin for a TinyLoRA layer with an adapter: further adapters reuse its decomposition."""

    def _init_svd(self: Any, adapter_name: str, r: int, fan_in_fan_out: bool) -> None:
        first = next(iter(self.r))
        self.r[adapter_name] = self.r[first]
        for fixed in (self.tinylora_A, self.tinylora_B):
            fixed[adapter_name] = fixed[first]


__all__ = [
    "BaseTunerLayer",
    "HostDrawnVera",
    "IA3Layer",
    "LoraLayer",
    "MissLayer",
    "ParamWrapper",
    "SharedDecomposition",
    "TinyLoraLayer",
    "TinyLoraModel",
    "VeraLayer",
    "set_active",
    "transformers_weight_conversion",
]
