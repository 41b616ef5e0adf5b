"""Sampling answers with a KV cache, keeping the log-probability each token was drawn with.

A hand-written loop instead of `generate`: it keeps (B,) log-probs and values a step where `generate` would hand
back logits of B x T x V, and rows that ended leave the batch.

Axis letters: B answers, P prompt positions, T answer positions, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from perl.model.roles import Role, Roles

BUCKET = 16
"""Prompts are padded to a multiple of this, so that few shapes occur (varied shapes make memory creep on CPU)."""


class Samples(NamedTuple):
    """Prompts with the answers drawn for them: prompts padded on the left, answers on the right."""

    ids_BL: Tensor
    """Prompt and answer, L = P + T, int64."""
    mask_BL: Tensor
    """True for real tokens, bool."""
    log_probs_BT: Tensor
    """What each token was drawn with, fp32; 0 in the padding."""
    values_BT: Tensor | None
    """The head's value of the state before each token, fp32; 0 in the padding."""
    ended_B: Tensor
    """Whether the answer ended by itself, bool."""

    @property
    def answer_length(self) -> int:
        """T."""
        return self.log_probs_BT.shape[1]

    @property
    def answer_mask_BT(self) -> Tensor:
        """True for the answers' tokens."""
        return self.mask_BL[:, -self.answer_length :]

    def answers(self) -> list[list[int]]:
        """Each answer's tokens, the end-of-turn included where there is one."""
        ids_BT = self.ids_BL[:, -self.answer_length :]
        return [ids[mask].tolist() for ids, mask in zip(ids_BT, self.answer_mask_BT, strict=True)]


@torch.no_grad()
def sample(
    roles: Roles,
    role: Role,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    head: Role | None = None,
) -> Samples:
    """Draw one answer for each prompt from softmax(logits / temperature), as one role.

    Args:
        prompts: token ids, not empty.
        end_id: the token that ends an answer; it is part of the answer.
        max_new_tokens: T at most; answers without an end are cut there.
        generator: on the base's device.
        head: whose head reads the value of each state.
    """
    device = roles.device
    prompt_ids_BP, prompt_mask_BP = left_pad(prompts, pad_id, device)
    batch = len(prompts)
    ids_BT = torch.full((batch, max_new_tokens), pad_id, device=device)
    mask_BT = torch.zeros((batch, max_new_tokens), dtype=torch.bool, device=device)
    log_probs_BT = torch.zeros((batch, max_new_tokens), device=device)
    values_BT = torch.zeros((batch, max_new_tokens), device=device) if head is not None else None
    ended_B = torch.zeros(batch, dtype=torch.bool, device=device)

    rows = torch.arange(batch, device=device)  # the rows of the whole that are still being written
    ids, mask = prompt_ids_BP, prompt_mask_BP.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with roles.role(role):
        model = roles.model()
        embedding, cache = model.get_output_embeddings(), DynamicCache(config=model.config)
        for step in range(max_new_tokens):
            hidden_BD = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            all_log_probs_BV = (embedding(hidden_BD).float() / temperature).log_softmax(-1)
            drawn_B = torch.multinomial(all_log_probs_BV.exp(), 1, generator=generator)
            ids_BT[rows, step] = drawn_B[:, 0]
            mask_BT[rows, step] = True
            log_probs_BT[rows, step] = all_log_probs_BV.gather(1, drawn_B)[:, 0]
            if values_BT is not None and head is not None:
                values_BT[rows, step] = roles.head(head)(hidden_BD.float())[:, 0]
            done_B = drawn_B[:, 0] == end_id
            ended_B[rows[done_B]] = True
            ids, positions = drawn_B, positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if done_B.any():
                keep = (~done_B).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                rows, ids, mask, positions = rows[keep], ids[keep], mask[keep], positions[keep]
                cache.batch_select_indices(keep)
    return Samples(
        torch.cat([prompt_ids_BP, ids_BT], dim=1),
        torch.cat([prompt_mask_BP, mask_BT], dim=1),
        log_probs_BT,
        values_BT,
        ended_B,
    )


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as ids and mask, padded on the left to a multiple of `BUCKET`."""
    length = -(-max(len(row) for row in rows) // BUCKET) * BUCKET
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = True
    return ids.to(device), mask.to(device)
