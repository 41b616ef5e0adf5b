"""The kinds of models: how each is recognised, loaded, fed, read and made to score.

A plugin adds its own kind: `BACKBONES["mine"] = Mine`. Of several that match, the one added last is taken.
"""

from typing import Any

from perl.backbones import masks  # noqa: F401  registered for transformers
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
"""By name; the first one matches every model."""


def backbone_of(config: Any) -> Backbone:
    """The backbone of a model with this transformers configuration."""
    return next(kind(config) for kind in reversed(BACKBONES.values()) if kind.matches(config))
