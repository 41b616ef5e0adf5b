"""transformers' masks for `sdpa`, created without synchronizing with the GPU.

transformers omits a mask if nothing is masked. To find out, it reads the mask, so the host waits for the GPU in
every pass, and at every sampled token. Batches are nearly always padded, so little is lost without this.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def mask_without_waiting(attention_mask: Tensor | None = None, **asked: Any) -> Tensor | None:
    """Return the mask (B, 1, queries, L) from transformers' own function, with its keyword arguments."""
    if attention_mask is not None and attention_mask.device.type != "cpu":
        asked |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **asked)
    return mask


AttentionMaskInterface.register("sdpa", mask_without_waiting)
