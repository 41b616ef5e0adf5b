"""Transforms that models apply to their logits after the output embedding.

    Granite: z / logits_scaling      Cohere, HyperCLOVA X: z · scale      Gemma 2: cap · tanh(z / cap)
    T5 with tied embeddings: z / √D

as in transformers' `modeling_granite.py`, `modeling_cohere.py`, `modeling_hyperclovax.py`, `modeling_gemma2.py`
and `modeling_t5.py`. A constant scale acts like a temperature; a cap has its own derivative.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

SCALES = {"granite": ("logits_scaling", -1), "cohere": ("logit_scale", 1), "hyperclovax": ("logits_scaling", 1)}
"""By prefix of the model type: the configuration key of the scale, and its exponent in the factor."""


@dataclass(frozen=True)
class LogitsTransform:
    """The map from z, the product with the output embedding, to cap · tanh(scale · z / cap) or scale · z."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, product_NV: Tensor, temperature: float) -> Tensor:
        """Return the logits divided by the temperature, fp32, computed in place."""
        if self.cap is not None:
            return product_NV.mul_(self.scale / self.cap).tanh_().mul_(self.cap / temperature)
        divisor = temperature / self.scale
        return product_NV if divisor == 1.0 else product_NV.div_(divisor)

    def slope_(self, logits_NV: Tensor, temperature: float) -> Tensor | None:
        """Return the cap's derivative 1 - tanh², computed in place from `apply_`'s logits; None without a cap."""
        if self.cap is None:
            return None
        return logits_NV.mul_(temperature / self.cap).square_().neg_().add_(1.0)


PLAIN = LogitsTransform()


def logits_transform(config: Any) -> LogitsTransform:
    """Return the transform of a model with this transformers configuration, if it is one of the above."""
    text = config.get_text_config()
    scale, cap = 1.0, getattr(text, "final_logit_softcapping", None)
    for kind, (name, power) in SCALES.items():
        if text.model_type.startswith(kind):
            scale = float(getattr(text, name, None) or 1.0) ** power
    if getattr(text, "scale_decoder_outputs", False):
        scale = float(text.hidden_size) ** -0.5
    return LogitsTransform(scale, cap)
