"""A decoder in two parts: the blocks below every adapter, alike for all roles, and those above.

What the lower blocks compute of a text is the same whoever reads it and however often, so it can be computed once
and kept: (B, L, D) in the base's dtype. transformers' own forward does both parts. The upper one is given the
lower one's result in the place of embeddings, so an architecture that does more to embeddings than pass them on
(GPT-2 adds positions, Gemma scales) cannot be split; `why_not` finds out by trying.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def _only(lm: PreTrainedModel, chosen: slice) -> Iterator[None]:
    """Inside, the trunk has these blocks only."""
    trunk = lm.base_model
    count = lm.config.get_text_config().num_hidden_layers
    name, blocks = next(
        (name, part)
        for name, part in trunk.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == count
    )
    setattr(trunk, name, blocks[chosen])
    try:
        yield
    finally:
        setattr(trunk, name, blocks)


@torch.no_grad()
def lower(lm: PreTrainedModel, count: int, ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """Hidden states (B, L, D) after the first `count` blocks, in the base's dtype."""
    found: list[Tensor] = []
    with _only(lm, slice(count)):
        last = next(part[-1] for part in lm.base_model.children() if isinstance(part, nn.ModuleList))
        hook = last.register_forward_hook(
            lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            lm.base_model(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_BL, use_cache=False)
        finally:
            hook.remove()
    return found[0]


def upper(lm: PreTrainedModel, count: int, below_BLD: Tensor, mask_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """Hidden states (B, L, D) after the last norm, from those after the first `count` blocks."""
    with _only(lm, slice(count, None)):
        hidden: Tensor = lm.base_model(
            inputs_embeds=below_BLD, attention_mask=mask_BL, position_ids=positions_BL, use_cache=False
        ).last_hidden_state
    return hidden


@torch.no_grad()
def why_not(lm: PreTrainedModel, count: int) -> str | None:
    """Why this model cannot be split after so many blocks; None if it can, as seen on a small batch."""
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        return f"its layers are of several kinds ({', '.join(sorted(kinds))})"
    mask_BL = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=lm.device)
    ids_BL = torch.tensor([[1, 2, 3, 1], [0, 0, 2, 1]], device=lm.device)
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    whole = lm.base_model(
        input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_BL, use_cache=False
    ).last_hidden_state
    try:
        below = lower(lm, count, ids_BL, mask_BL, positions_BL)
        split = upper(lm, count, below, mask_BL, positions_BL)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        return f"{type(lm).__name__} does not run in two parts: {str(error).splitlines()[0][:200]}"
    rounding, padding_BL1 = 16 * torch.finfo(whole.dtype).eps, (mask_BL == 0)[..., None]
    split, whole = split.masked_fill(padding_BL1, 0.0), whole.masked_fill(padding_BL1, 0.0)
    if not torch.allclose(split, whole, rtol=rounding, atol=rounding):
        return f"{type(lm).__name__} does more to its embeddings than pass them to the first block"
    return None
