"""Rows of tokens as one padded batch. Axis letters: `perl.roles`."""

from collections.abc import Sequence

import torch
from torch import Tensor

BUCKET = 16
"""Rows are padded to a multiple of this, so that few shapes occur (varied shapes make memory creep on CPU)."""


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as ids and mask, padded on the left to a multiple of `BUCKET`."""
    length = -(-max(len(row) for row in rows) // BUCKET) * BUCKET
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = True
    return ids.to(device), mask.to(device)


def positions(mask_BL: Tensor) -> Tensor:
    """Each token's number in its row (B, L), int64: counted over real tokens, so padding on any side is right."""
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)
