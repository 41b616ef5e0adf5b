"""Sampling answers with a KV cache, keeping the log-probability each token was drawn with.

A hand-written loop instead of `generate`: it keeps (B,) log-probs and values a step where `generate` would hand
back logits of B x T x V, and rows that ended leave the batch.

Axis letters: B answers, P prompt positions, T answer positions, V vocabulary, D hidden.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perl.model.roles import Role, Roles
from perl.rl.kv_cache import KVCache

BUCKET = 16
"""Prompts are padded to a multiple of this, so that few shapes occur (varied shapes make memory creep on CPU)."""


class Samples(NamedTuple):
    """Prompts with the answers drawn for them: prompts padded on the left, answers on the right."""

    ids_BL: Tensor
    """Prompt and answer, L = P + T, int64."""
    mask_BL: Tensor
    """True for real tokens, bool."""
    prompt_lengths: list[int]
    answer_lengths: list[int]
    """The same in counts, on the host: what is cut and batched by length must not wait for the device."""
    log_probs_BT: Tensor
    """What each token was drawn with, fp32; 0 in the padding."""
    values_BT: Tensor | None
    """The head's value of the state before each token, fp32; 0 in the padding."""
    ended_B: Tensor
    """Whether the answer ended by itself, bool."""
    abridged: bool = False
    """Not all that was drawn was computed, and not all micro-batches of it are to be; see `Sampling`."""

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
        rows = self.ids_BL[:, -self.answer_length :].tolist()
        return [row[:length] for row, length in zip(rows, self.answer_lengths, strict=True)]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from softmax(logits / temperature)."""

    max_new_tokens: int
    """T; answers without an end are cut there."""
    temperature: float
    end_id: int | None
    """The token that ends an answer, and belongs to it. None: answers all have T tokens."""
    pad_id: int
    abridged: bool = False
    """Compute the first and the last token of each answer only: for estimates, as memory peaks at one of them."""


@torch.no_grad()
def sample(
    roles: Roles,
    role: Role,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generator: torch.Generator,
    head: Role | None = None,
) -> Samples:
    """Draw one answer for each prompt, as one role.

    Args:
        prompts: token ids, not empty.
        generator: on the base's device.
        head: whose head reads the value of each state.
    """
    device, length = roles.device, sampling.max_new_tokens
    prompt_ids_BP, prompt_mask_BP = left_pad(prompts, sampling.pad_id, device)
    batch = len(prompts)
    ids_BT = torch.full((batch, length), sampling.pad_id, device=device)
    lengths, ended = [length] * batch, [False] * batch

    writing = list(range(batch))  # the rows that are still being written, and the same as a tensor
    rows = torch.arange(batch, device=device)
    ids, mask = prompt_ids_BP, prompt_mask_BP.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with roles.role(role):
        model = roles.model()
        embedding = model.get_output_embeddings()
        cache = KVCache(model, ids.shape[1] + length)
        log_probs_BT = embedding.weight.new_zeros((batch, length), dtype=torch.float32)
        values_BT = torch.zeros_like(log_probs_BT) if head is not None else None
        for step in range(length):
            if sampling.abridged and 0 < step < length - 1:
                cache.skip(1)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                continue
            hidden_BD = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            all_log_probs_BV = (embedding(hidden_BD).float() / sampling.temperature).log_softmax(-1)
            drawn_B = draw(all_log_probs_BV, generator)
            ids_BT[rows, step] = drawn_B
            log_probs_BT[rows, step] = all_log_probs_BV.gather(1, drawn_B[:, None])[:, 0]
            if values_BT is not None and head is not None:
                values_BT[rows, step] = roles.head(head)(hidden_BD.float())[:, 0]
            ids, positions = drawn_B[:, None], positions[:, -1:] + 1
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            done = [] if sampling.end_id is None else (drawn_B == sampling.end_id).tolist()
            if any(done):
                for row in itertools.compress(writing, done):
                    lengths[row], ended[row] = step + 1, True
                going = [place for place, is_done in enumerate(done) if not is_done]
                if not going:
                    break
                keep = torch.tensor(going, device=device)
                writing = [writing[place] for place in going]
                rows, ids, mask, positions = rows[keep], ids[keep], mask[keep], positions[keep]
                cache.keep(keep)
    mask_BT = torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]
    return Samples(
        torch.cat([prompt_ids_BP, ids_BT], dim=1),
        torch.cat([prompt_mask_BP, mask_BT], dim=1),
        [len(prompt) for prompt in prompts],
        lengths,
        log_probs_BT,
        values_BT,
        torch.tensor(ended, device=device),
        sampling.abridged,
    )


def draw(log_probs_BV: Tensor, generator: torch.Generator) -> Tensor:
    """A token id (B) from each row's distribution."""
    return torch.multinomial(log_probs_BV.exp(), 1, generator=generator)[:, 0]


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as ids and mask, padded on the left to a multiple of `BUCKET`."""
    length = -(-max(len(row) for row in rows) // BUCKET) * BUCKET
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = True
    return ids.to(device), mask.to(device)
