"""A decoder in two parts: the blocks below every adapter, which compute alike for all roles, and those above.

The lower blocks' output for a text is the same for every role and epoch, so it is computed once: (B, L, D) in the
base's dtype. The upper part takes it in place of embeddings, so an architecture that does more to embeddings than
pass them on (GPT-2 adds positions, Gemma scales) cannot be split; `unsupported_reason` tries.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.backbones.backbone import Backbone
from perl.errors import UserError


@contextlib.contextmanager
def only(backbone: Backbone, lm: PreTrainedModel, chosen: slice) -> Iterator[None]:
    """Inside, the trunk has these blocks only."""
    holder, name = backbone.block_list(lm)
    blocks = getattr(holder, name)
    setattr(holder, name, blocks[chosen])
    try:
        yield
    finally:
        setattr(holder, name, blocks)


@contextlib.contextmanager
def watched(backbone: Backbone, lm: PreTrainedModel, count: int) -> Iterator[list[Tensor]]:
    """Inside, the list holds the output of the first `count` blocks in the last forward; it stays empty if 0."""
    outputs: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[:] = [output[0] if isinstance(output, tuple) else output]

    with contextlib.ExitStack() as stack:
        if count:
            stack.callback(backbone.blocks(lm)[count - 1].register_forward_hook(note).remove)
        yield outputs


@torch.no_grad()
def lower(backbone: Backbone, lm: PreTrainedModel, count: int, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Hidden states (B, L, D) after the first `count` blocks, in the base's dtype."""
    with watched(backbone, lm, count) as seen, only(backbone, lm, slice(count)):
        backbone.hidden(lm, ids_BL, mask_BL)
    return seen[0]


@torch.no_grad()
def unsupported_reason(backbone: Backbone, lm: PreTrainedModel, count: int) -> str | None:
    """Why this model cannot be split after so many blocks; None if it can, as tried on a small batch."""
    name = type(lm).__name__
    if (refused := backbone.refusal("splitting", name)) is not None:
        return refused.what
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        return f"its layers are of several kinds ({', '.join(sorted(kinds))})"
    mask_BL = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=lm.device).bool()
    ids_BL = torch.tensor([[1, 2, 3, 1], [0, 0, 2, 1]], device=lm.device)
    unsplit = backbone.hidden(lm, ids_BL, mask_BL)
    try:
        lower_hidden_BLD = lower(backbone, lm, count, ids_BL, mask_BL)
        with only(backbone, lm, slice(count, None)):
            split = backbone.hidden(lm, ids_BL, mask_BL, lower_hidden_BLD)
    except (UserError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"{name} does not run in two parts: {str(error).splitlines()[0][:200]}"
    rounding = 16 * torch.finfo(unsplit.dtype).eps
    split, unsplit = (states.masked_fill(~mask_BL[..., None], 0.0) for states in (split, unsplit))
    if not torch.allclose(split, unsplit, rtol=rounding, atol=rounding):
        return f"{name} does more to its embeddings than pass them to the first block"
    return None
