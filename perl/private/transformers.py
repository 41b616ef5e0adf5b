"""What is used of transformers beyond its documented interface."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import moe
from transformers.models.auto import modeling_auto

from perl.private.checked import need

need(modeling_auto, "MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING")
need(GenerationConfig(), "_from_model_config")
need(PreTrainedModel, "_can_compile_fullgraph")
need(moe, "_default_apply_gate")  # what a class of experts has as `_apply_gate` if it defines none itself


def has_masked_lm(config: Any) -> bool:
    """Whether transformers has a masked language model of this configuration."""
    return type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING


def has_classifier(config: Any) -> bool:
    """Whether transformers has a sequence classifier of this configuration."""
    return type(config) in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def can_compile_fullgraph(model: PreTrainedModel) -> bool:
    """Whether a model's attention works with a cache of constant length."""
    return bool(model._can_compile_fullgraph)


def gated(experts: Any, gate_up: Tensor) -> Tensor:
    """The gate's activation times the other half, as a module of experts combines the two (S, 2 I) -> (S, I)."""
    inner: Tensor = experts._apply_gate(gate_up)
    return inner


def is_derived(generation: GenerationConfig) -> bool:
    """Whether a generation configuration was derived from the model's, for want of a file of its own."""
    return bool(generation._from_model_config)
