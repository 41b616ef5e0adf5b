"""Padding of token rows to a batch. Axis letters: `perl.roles`."""

from collections.abc import Sequence

import torch
from torch import Tensor

BUCKET = 16
"""Rows are padded to a multiple of this, to limit the number of shapes (many shapes make CPU memory grow)."""


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask of rows, padded on the left to a multiple of `BUCKET`."""
    length = -(-max(len(row) for row in rows) // BUCKET) * BUCKET
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = True
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def at_the_end(lengths: Sequence[int], mask_BL: Tensor) -> Tensor:
    """Return a bool mask like `mask_BL` that is True for the last `lengths[i]` columns of row i."""
    columns = mask_BL.shape[1]
    starts_B = torch.tensor([columns - length for length in lengths])
    return (torch.arange(columns) >= starts_B[:, None]).to(mask_BL.device, non_blocking=True)


def joined(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B, L) of prompts padded on the left followed by completions padded on the right."""
    ids_BP, mask_BP = left_pad(prompts, pad_id, device)
    length = max(len(one) for one in completions)
    ids_BT = torch.tensor([[*one, *[pad_id] * (length - len(one))] for one in completions], device=device)
    lengths_B1 = torch.tensor([[len(one)] for one in completions], device=device)
    mask_BT = torch.arange(length, device=device) < lengths_B1
    return torch.cat([ids_BP, ids_BT], 1), torch.cat([mask_BP, mask_BT], 1)


def positions(mask_BL: Tensor) -> Tensor:
    """Return each token's position in its row (B, L), int64, counted over real tokens wherever the padding is."""
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)
