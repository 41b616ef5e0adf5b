"""The kinds of models: for each, recognition, loading, inputs, outputs and scoring.

A plugin can add a kind: `BACKBONES["mine"] = Mine`. If several match, the one added last is used.
"""

from typing import Any

from perl.backbones import masks  # noqa: F401  registers them with transformers
from perl.backbones.backbone import Backbone, Unsupported
from perl.backbones.decoder import Decoder
from perl.backbones.encoder import Encoder
from perl.backbones.encoder_decoder import EncoderDecoder

__all__ = ["BACKBONES", "Backbone", "Decoder", "Encoder", "EncoderDecoder", "Unsupported", "backbone_of"]

BACKBONES: dict[str, type[Backbone]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder-decoder": EncoderDecoder,
}
"""All kinds by name; the first one matches every model."""


def backbone_of(config: Any) -> Backbone:
    """Return the backbone of a model with this transformers configuration."""
    return next(kind(config) for kind in reversed(BACKBONES.values()) if kind.matches(config))
