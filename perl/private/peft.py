"""The private interfaces of peft that this package uses."""

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
    "_active_adapter",
    "resolve_lora_variant",
    "adapter_layer_names",
    "other_param_names",
    "get_base_layer",
)
need(DoraLinearLayer, "get_weight_norm", "get_lora_weight")
need(BaseTuner, "inject_adapter")
need(VeraModel, "_init_vera_A_vera_B")
need(TinyLoraLayer, "_init_svd")
need(transformers_weight_conversion, "convert_peft_config_for_transformers")

ParamWrapper = layer.ParamWrapper
"""LoRA on a parameter of a module, such as the weights of experts."""

__all__ = [
    "BaseTunerLayer",
    "IA3Layer",
    "LoraLayer",
    "MissLayer",
    "ParamWrapper",
    "TinyLoraLayer",
    "TinyLoraModel",
    "VeraLayer",
    "VeraModel",
    "transformers_weight_conversion",
]
