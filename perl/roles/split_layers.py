"""A decoder in two parts: the blocks below every adapter, alike for all roles, and those above.

What the lower blocks compute of a text is the same whoever reads it and however often, so it can be computed once
and kept: (B, L, D) in the base's dtype. transformers' own forward does both parts. The upper one is given the
lower one's result in the place of embeddings, so an architecture that does more to embeddings than pass them on
(GPT-2 adds positions, Gemma scales) cannot be split; `unsupported_reason` finds out by trying.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.backbones.encoder import is_encoder


def positions(mask_BL: Tensor) -> Tensor:
    """Each token's number in its row (B, L), int64: counted over real tokens, so padding on any side is right."""
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)


def _blocks(lm: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks, and the trunk's attribute that holds them."""
    count = lm.config.get_text_config().num_hidden_layers
    return next(
        (name, part)
        for name, part in lm.base_model.named_modules()  # an encoder's are not the trunk's own
        if isinstance(part, nn.ModuleList) and len(part) == count
    )


def blocks(lm: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks, the lowest first."""
    return list(_blocks(lm)[1])


@contextlib.contextmanager
def _only(lm: PreTrainedModel, chosen: slice) -> Iterator[None]:
    """Inside, the trunk has these blocks only."""
    trunk = lm.base_model
    name, blocks = _blocks(lm)
    setattr(trunk, name, blocks[chosen])
    try:
        yield
    finally:
        setattr(trunk, name, blocks)


@contextlib.contextmanager
def watched(lm: PreTrainedModel, count: int) -> Iterator[list[Tensor]]:
    """Inside, each forward leaves in the list what the first `count` blocks made of it, alone; nothing if 0."""
    seen: list[Tensor] = []

    def see(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[:] = [output[0] if isinstance(output, tuple) else output]

    with contextlib.ExitStack() as stack:
        if count:
            stack.callback(_blocks(lm)[1][count - 1].register_forward_hook(see).remove)
        yield seen


@torch.no_grad()
def lower(lm: PreTrainedModel, count: int, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Hidden states (B, L, D) after the first `count` blocks, in the base's dtype."""
    with watched(lm, count) as seen, _only(lm, slice(count)):
        lm.base_model(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions(mask_BL), use_cache=False)
    return seen[0]


def upper(lm: PreTrainedModel, count: int, lower_hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Hidden states (B, L, D) after the last norm, from those after the first `count` blocks."""
    with _only(lm, slice(count, None)):
        hidden: Tensor = lm.base_model(
            inputs_embeds=lower_hidden_BLD,
            attention_mask=mask_BL,
            position_ids=positions(mask_BL),
            use_cache=False,
        ).last_hidden_state
    return hidden


@torch.no_grad()
def unsupported_reason(lm: PreTrainedModel, count: int) -> str | None:
    """Why this model cannot be split after so many blocks; None if it can, as seen on a small batch."""
    if is_encoder(lm.config):
        return f"{type(lm).__name__} is an encoder, which does more to its embeddings than pass them on"
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        return f"its layers are of several kinds ({', '.join(sorted(kinds))})"
    mask_BL = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=lm.device)
    ids_BL = torch.tensor([[1, 2, 3, 1], [0, 0, 2, 1]], device=lm.device)
    whole = lm.base_model(
        input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions(mask_BL), use_cache=False
    ).last_hidden_state
    try:
        below = lower(lm, count, ids_BL, mask_BL)
        split = upper(lm, count, below, mask_BL)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        return f"{type(lm).__name__} does not run in two parts: {str(error).splitlines()[0][:200]}"
    rounding, padding_BL1 = 16 * torch.finfo(whole.dtype).eps, (mask_BL == 0)[..., None]
    split, whole = split.masked_fill(padding_BL1, 0.0), whole.masked_fill(padding_BL1, 0.0)
    if not torch.allclose(split, whole, rtol=rounding, atol=rounding):
        return f"{type(lm).__name__} does more to its embeddings than pass them to the first block"
    return None
