"""Splitting a decoder, or an encoder of prompts, into the blocks below all adapters, whose output is the same for
all roles, and those above.

The lower blocks' output for a text is the same for every role and epoch, so it is computed once: (B, L, D) in the
base's dtype. The upper part takes it in place of embeddings, so an architecture that transforms its embeddings
(GPT-2 adds positions, Gemma scales them) cannot be split; `unsupported_reason` tests this.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from perl.backbones.backbone import Backbone
from perl.backbones.padding import left_pad
from perl.errors import UserError
from perl.roles.roles import Roles


@torch.no_grad()
def unsupported_reason(backbone: Backbone, lm: PreTrainedModel, count: int) -> str | None:
    """Return why this model cannot be split after `count` blocks; None if it can, as tested on a small batch."""
    name = type(lm).__name__
    if (refused := backbone.refusal("splitting", name)) is not None:
        return refused.what
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        return f"its layers are of several types ({', '.join(sorted(kinds))})"
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
        reason, _, _ = str(error).partition("\n")
        return f"{name} cannot run in two parts: {reason[:200]}"
    rounding = 16 * torch.finfo(unsplit.dtype).eps
    split, unsplit = (states.masked_fill(~mask_BL[..., None], 0.0) for states in (split, unsplit))
    if not torch.allclose(split, unsplit, rtol=rounding, atol=rounding):
        return f"{name} transforms its embeddings before the first block"
    return None


SHARE_OF_FREE_MEMORY = 0.25
"""Largest cache that is kept in memory; a larger one is a memory-mapped file."""
GROUP = 8
"""Number of rows computed together."""


class LowerLayerCache:
    """Cache of the hidden states after the shared blocks, computed once for all epochs.

    Each row's states are (tokens, D) in the base's dtype, and computed when first read.

    A row is always computed in the same group of rows of similar length: in another batch its last bits would
    differ, and a resumed run would not end in the same bytes.

    Args:
        roles: roles on a base with shared blocks.
        rows: the tokens of each row.
        folder: where to put the file if the cache is too large for memory.
    """

    def __init__(self, roles: Roles, rows: Sequence[Sequence[int]], pad_id: int, folder: Path) -> None:
        self._roles, self._rows, self._pad_id = roles, rows, pad_id
        self._ends = list(itertools.accumulate((len(row) for row in rows), initial=0))
        self._by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        self._place = {row: place for place, row in enumerate(self._by_length)}
        self._known = [False] * len(rows)
        width, dtype = roles.models()[0].get_input_embeddings().weight.shape[1], roles.models()[0].dtype
        size = self._ends[-1] * width
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size * dtype.itemsize <= SHARE_OF_FREE_MEMORY * free:
            flat = torch.empty(size, dtype=dtype)
        else:
            flat = torch.from_file(str(folder / "lower_hidden.bin"), shared=True, size=size, dtype=dtype)
        self._states = flat.view(-1, width)
        self.bytes = flat.nbytes
        """Size on the host, whatever the device; not part of the live bytes of a step."""

    def read(self, rows: Sequence[int], mask_BL: Tensor) -> Tensor:
        """Return the hidden states (B, L, D) of the rows of a batch, for `Roles.forward`; 0 in the padding."""
        for row in rows:
            if not self._known[row]:
                self._compute(self._place[row] // GROUP * GROUP)
        lower_hidden_BLD = self._states.new_zeros(*mask_BL.shape, self._states.shape[1])
        lower_hidden_BLD[mask_BL.cpu()] = torch.cat([self._of(row) for row in rows])
        return lower_hidden_BLD.to(mask_BL.device)

    def _compute(self, start: int) -> None:
        """Compute the group that starts at this position."""
        group = self._by_length[start : start + GROUP]
        ids_BL, mask_BL = left_pad([self._rows[row] for row in group], self._pad_id, self._roles.device)
        lower_hidden_BLD = self._roles.lower_hidden(ids_BL, mask_BL).cpu()
        for row, states_LD, mask_L in zip(group, lower_hidden_BLD, mask_BL.cpu(), strict=True):
            self._of(row).copy_(states_LD[mask_L])
            self._known[row] = True

    def _of(self, row: int) -> Tensor:
        return self._states[self._ends[row] : self._ends[row + 1]]
