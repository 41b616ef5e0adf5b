"""transformers' masks for `sdpa`, made without a look at what a GPU has computed.

transformers leaves a mask out where nothing is masked. To know that it reads the mask, so the host waits for the
GPU in every pass, and at every token that is drawn. Batches are padded nearly always: little is lost without.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def mask_without_waiting(attention_mask: Tensor | None = None, **asked: Any) -> Tensor | None:
    """The mask (B, 1, queries, L) of transformers' own function; arguments as there, by name."""
    if attention_mask is not None and attention_mask.device.type != "cpu":
        asked |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **asked)
    return mask


AttentionMaskInterface.register("sdpa", mask_without_waiting)
