"""What is used of transformers beyond its documented interface."""

from typing import Any

from transformers import GenerationConfig
from transformers.models.auto import modeling_auto

from perl.private.checked import need

need(modeling_auto, "MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING")
need(GenerationConfig(), "_from_model_config")


def has_masked_lm(config: Any) -> bool:
    """Whether transformers has a masked language model of this configuration."""
    return type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING


def has_classifier(config: Any) -> bool:
    """Whether transformers has a sequence classifier of this configuration."""
    return type(config) in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def is_derived(generation: GenerationConfig) -> bool:
    """Whether a generation configuration was derived from the model's, for want of a file of its own."""
    return bool(generation._from_model_config)
