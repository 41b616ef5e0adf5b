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
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def at_the_end(lengths: Sequence[int], mask_BL: Tensor) -> Tensor:
    """True for the last so many columns of each row, bool, as `mask_BL`."""
    columns = mask_BL.shape[1]
    starts_B = torch.tensor([columns - length for length in lengths])
    return (torch.arange(columns) >= starts_B[:, None]).to(mask_BL.device, non_blocking=True)


def joined(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left and completions padded on the right, side by side, as ids and mask (B, L)."""
    ids_BP, mask_BP = left_pad(prompts, pad_id, device)
    length = max(len(one) for one in completions)
    ids_BT = torch.tensor([[*one, *[pad_id] * (length - len(one))] for one in completions], device=device)
    lengths_B1 = torch.tensor([[len(one)] for one in completions], device=device)
    mask_BT = torch.arange(length, device=device) < lengths_B1
    return torch.cat([ids_BP, ids_BT], 1), torch.cat([mask_BP, mask_BT], 1)


def positions(mask_BL: Tensor) -> Tensor:
    """Each token's number in its row (B, L), int64: counted over real tokens, so padding on any side is right."""
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)
