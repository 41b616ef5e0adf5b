"""A decoder, or an encoder of prompts, in two parts: the blocks below every adapter, which compute alike for all
roles, and those above.

The lower blocks' output for a text is the same for every role and epoch, so it is computed once: (B, L, D) in the
base's dtype. The upper part takes it in place of embeddings, so an architecture that does more to embeddings than
pass them on (GPT-2 adds positions, Gemma scales) cannot be split; `unsupported_reason` tries.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from perl.backbones.backbone import Backbone
from perl.errors import UserError


@torch.no_grad()
def unsupported_reason(backbone: Backbone, lm: PreTrainedModel, count: int) -> str | None:
    """Why this model cannot be split after so many blocks; None if it can, as tried on a small batch."""
    name = type(lm).__name__
    if (refused := backbone.refusal("splitting", name)) is not None:
        return refused.what
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        return f"its layers are of several kinds ({', '.join(sorted(kinds))})"
    ids_BL = F.pad(torch.tensor(backbone.tried, device=lm.device), (2, 0), value=1)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    mask_BL[1, :2] = False
    unsplit = backbone.hidden(lm, ids_BL, mask_BL)
    try:
        if count >= len(getattr(*backbone.block_list(lm))):
            return f"{name} has no adapter in its encoder"
        lower_hidden_BLD = backbone.lower(lm, count, ids_BL, mask_BL)
        with backbone.only(lm, slice(count, None)):
            split = backbone.hidden(lm, ids_BL, mask_BL, lower_hidden_BLD)
    except (UserError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"{name} does not run in two parts: {str(error).splitlines()[0][:200]}"
    rounding = 16 * torch.finfo(unsplit.dtype).eps
    split, unsplit = (states.masked_fill(~mask_BL[..., None], 0.0) for states in (split, unsplit))
    if not torch.allclose(split, unsplit, rtol=rounding, atol=rounding):
        return f"{name} does more to its embeddings than pass them to the first block"
    return None
