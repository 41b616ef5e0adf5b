"""The private interfaces of peft that this package uses."""

from peft.tuners.lora import LoraLayer, layer
from peft.utils import transformers_weight_conversion

from perl.private.checked import need

need(layer, "ParamWrapper")
need(
    LoraLayer,
    "_active_adapter",
    "adapter_layer_names",
    "other_param_names",
    "get_base_layer",
    "resolve_lora_variant",
)
need(transformers_weight_conversion, "convert_peft_config_for_transformers")

ParamWrapper = layer.ParamWrapper
"""LoRA on a parameter of a module, such as the weights of experts."""

__all__ = ["LoraLayer", "ParamWrapper", "transformers_weight_conversion"]
