"""The private interfaces of transformers that PERL uses."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import moe
from transformers.models.auto import modeling_auto

from perl.private.checked import need

need(
    modeling_auto,
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
)
need(GenerationConfig(), "_from_model_config")
need(PreTrainedModel, "_can_compile_fullgraph")
need(moe, "_default_apply_gate")  # the default `_apply_gate` of a class of experts


def has_masked_lm(config: Any) -> bool:
    """Return whether transformers has a masked language model for this configuration."""
    return type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING


def has_classifier(config: Any) -> bool:
    """Return whether transformers has a sequence classifier for this configuration."""
    return type(config) in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def can_compile_fullgraph(model: PreTrainedModel) -> bool:
    """Return whether a model's attention works with a static cache."""
    return bool(model._can_compile_fullgraph)


def gated(experts: Any, gate_up: Tensor) -> Tensor:
    """Apply the experts' gate to the fused projection, (S, 2 I) -> (S, I)."""
    inner: Tensor = experts._apply_gate(gate_up)
    return inner


def is_derived(generation: GenerationConfig) -> bool:
    """Return whether a generation configuration was derived from the model's because it had no file."""
    return bool(generation._from_model_config)


@functools.cache
def cache_argument(forward: Callable[..., object]) -> str:
    """Return the argument of a model's `forward` that takes its keys and values; empty if there is none.

    transformers 5.24 renamed it. There, recurrent models have one of that name too, of another type.
    """
    arguments = inspect.signature(forward).parameters
    if "past_key_values" in arguments:
        return "past_key_values"
    return "cache" if "cache" in arguments and Cache in get_args(arguments["cache"].annotation) else ""


def caches_keys_and_values(config: Any) -> bool:
    """Return whether a causal LM of this configuration caches attention keys and values, and nothing else.

    Recurrent and convolutional layers carry a state from token to token; some models have another cache, or none.
    """
    model = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is not None and not cache_argument(model.forward):
        return False
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return layers <= {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
