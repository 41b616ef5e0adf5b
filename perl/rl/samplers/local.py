"""Sampling answers with a KV cache, keeping the log-probability each token was drawn with.

A hand-written loop instead of `generate`: it keeps (B,) log-probs and values a step where `generate` would hand
back logits of B x T x V, rows that ended leave the batch, and equal prompts are computed once.

Axis letters: B answers, P prompt positions, T answer positions, V vocabulary, D hidden, E end tokens.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from perl.backbones.logits import logits_transform
from perl.backbones.padding import left_pad, positions
from perl.rl.samplers.decode_attention import fast_decoding
from perl.rl.samplers.kv_cache import KVCache
from perl.roles.roles import Role, Roles

KEEP_UNTIL = 0.75
"""Answers that ended leave the batch once so many of it, or fewer, go on: to leave means to copy all that stay."""


class Samples(NamedTuple):
    """Prompts with the answers drawn for them: prompts padded on the left, answers on the right."""

    ids_BL: Tensor
    """Prompt and answer, L = P + T, int64."""
    mask_BL: Tensor
    """True for real tokens, bool."""
    prompt_lengths: list[int]
    completion_lengths: list[int]
    """The same in counts, on the host: what is cut and batched by length must not wait for the device."""
    log_probs_BT: Tensor
    """What each token was drawn with, fp32; 0 in the padding."""
    values_BT: Tensor | None
    """The head's value of the state before each token, fp32; 0 in the padding."""
    ended_B: Tensor
    """Whether the answer ended by itself, bool."""
    lower_hidden_BLD: Tensor | None = None
    """What the base's shared blocks make of each position; None: not computed, or there are no such blocks."""
    abridged: bool = False
    """Not all that was drawn was computed, and not all micro-batches of it are to be; see `Sampling`."""

    @property
    def completion_length(self) -> int:
        """T."""
        return self.log_probs_BT.shape[1]

    @property
    def completion_mask_BT(self) -> Tensor:
        """True for the answers' tokens."""
        return self.mask_BL[:, -self.completion_length :]

    def completions(self) -> list[list[int]]:
        """Each answer's tokens, the end-of-turn included where there is one."""
        rows = self.ids_BL[:, -self.completion_length :].tolist()
        return [row[:length] for row, length in zip(rows, self.completion_lengths, strict=True)]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from softmax(logits / temperature)."""

    max_new_tokens: int
    """T; answers without an end are cut there."""
    temperature: float
    end_ids: tuple[int, ...]
    """Tokens that end an answer, and belong to it. Empty: answers all have T tokens."""
    pad_id: int
    prompts_at_once: int
    """Different prompts computed together before the answers are drawn: bounds their activations."""
    abridged: bool = False
    """Compute the first and the last token of each answer only: for estimates, as memory peaks at one of them."""


class Share(NamedTuple):
    """Which rows of a larger batch are drawn here: they draw as they would in it."""

    rows: list[int]
    of: int


@torch.no_grad()
def sample(
    roles: Roles,
    role: Role,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generator: torch.Generator,
    head: Role | None = None,
    share: Share | None = None,
) -> Samples:
    """Draw one answer for each prompt, as one role.

    What is drawn follows from the generator and a prompt's place, whatever stands beside it.

    Args:
        prompts: token ids, not empty. Equal ones are computed once.
        generator: on the base's device.
        head: whose head reads the value of each state.
        share: where these prompts stand in the batch of all processes; None: they are the batch.
    """
    device, length = roles.device, sampling.max_new_tokens
    rows, total = share or Share(list(range(len(prompts))), len(prompts))
    uniform_BT = torch.rand(total, length, dtype=torch.float64, generator=generator, device=generator.device)[rows]
    prompt_ids_BP, prompt_mask_BP = left_pad(prompts, sampling.pad_id, device)
    ids_BT = torch.full((len(prompts), length), sampling.pad_id, device=device)
    log_probs_BT = torch.zeros((len(prompts), length), device=device)
    values_BT = torch.zeros_like(log_probs_BT) if head is not None else None
    ends_E = torch.tensor(sampling.end_ids, device=device)
    lengths = [0] * len(prompts)  # of the answers that ended

    # Rows of like length stand together in the cache, those of the same prompt side by side.
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row]))
    rows_B = torch.tensor(order, device=device)
    mask_BL = prompt_mask_BP[rows_B].long()
    with roles.sampling(role) as seen, fast_decoding(device):
        model, start = roles.model(), prompt_ids_BP.shape[1]
        cache, below = KVCache(model, len(prompts), start, length), _Below(seen, len(prompts), start + length)
        hidden_BD = _prefill(roles, model, cache, [prompts[row] for row in order], rows_B, below, sampling)
        for step in range(length):
            ids_BT[rows_B, step], log_probs_BT[rows_B, step] = _draw_next(
                model, hidden_BD, sampling, uniform_BT[rows_B, step, None]
            )
            if values_BT is not None and head is not None:
                values_BT[rows_B, step] = roles.head(head)(hidden_BD.float())[:, 0]
            if sampling.end_ids:
                for row, is_end in zip(order, torch.isin(ids_BT[rows_B, step], ends_E).tolist(), strict=True):
                    lengths[row] = lengths[row] or (step + 1 if is_end else 0)
            going = [place for place, row in enumerate(order) if not lengths[row]]
            # Where the base is spread over processes, all compute on until every answer of every one has ended.
            done = not roles.together(len(going)) or step + 1 == length
            if done and not roles.shared_blocks:
                break  # nobody reads what is computed of the last tokens
            mask_BL = F.pad(mask_BL, (0, 1), value=1)
            if sampling.abridged and step + 2 < length:
                cache.skip(1)
                continue
            hidden_BD = _hidden(model, cache, ids_BT[rows_B, step : step + 1], mask_BL)[:, -1]
            below.keep(rows_B, start + step + 1)
            if done:
                break
            if 0 < len(going) <= KEEP_UNTIL * len(order):
                places = torch.tensor(going, device=device)
                order = [order[place] for place in going]
                rows_B, mask_BL, hidden_BD = rows_B[places], mask_BL[places], hidden_BD[places]
                cache.keep(places)
    ended = [one > 0 for one in lengths]
    lengths = [one or length for one in lengths]
    mask_BT = torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]
    return Samples(
        # Rows that had ended were drawn on for a while, until enough of them were there to be taken out.
        torch.cat([prompt_ids_BP, ids_BT.masked_fill(~mask_BT, sampling.pad_id)], dim=1),
        torch.cat([prompt_mask_BP, mask_BT], dim=1),
        [len(prompt) for prompt in prompts],
        lengths,
        log_probs_BT.masked_fill(~mask_BT, 0.0),
        values_BT.masked_fill(~mask_BT, 0.0) if values_BT is not None else None,
        torch.tensor(ended, device=device),
        below.states_BLD,
        abridged=sampling.abridged,
    )


class _Below:
    """What the shared blocks make of each position, kept as it comes by.

    The reference, the reward model and the critic, and every pass over the rollout, go on from there.
    """

    def __init__(self, seen: list[Tensor], rows: int, length: int) -> None:
        self._seen, self._rows, self._length = seen, rows, length
        self.states_BLD: Tensor | None = None
        """None where there are no such blocks."""

    def keep(self, rows_B: Tensor, end: int, copies_B: Tensor | None = None) -> None:
        """Keep what was computed last, of these rows the columns up to `end`.

        Args:
            rows_B: their places in the samples.
            copies_B: how often each row that was computed stands among them, side by side; None: once.
        """
        if not self._seen:
            return
        (states_BND,) = self._seen
        if self.states_BLD is None:
            self.states_BLD = states_BND.new_zeros(self._rows, self._length, states_BND.shape[2])
        if copies_B is not None:
            states_BND = states_BND.repeat_interleave(copies_B, 0)
        self.states_BLD[rows_B, end - states_BND.shape[1] : end] = states_BND


def _prefill(
    roles: Roles,
    model: PreTrainedModel,
    cache: KVCache,
    prompts: list[Sequence[int]],
    rows_B: Tensor,
    below: _Below,
    sampling: Sampling,
) -> Tensor:
    """The hidden states (B, D) after each prompt; equal prompts stand side by side and are computed once."""
    groups = [(list(prompt), len(list(same))) for prompt, same in itertools.groupby(prompts)]
    parts, row = [], 0
    starts = range(0, len(groups), sampling.prompts_at_once)
    passes = roles.together(len(starts))  # asked before the first: who has fewer would ask while others compute
    for start in starts:
        some = groups[start : start + sampling.prompts_at_once]
        copies = [count for _, count in some]
        rows = slice(row, row + sum(copies))
        row = rows.stop
        if sampling.abridged and row < len(prompts):
            continue  # the last are the longest
        ids_BP, mask_BP = left_pad([prompt for prompt, _ in some], sampling.pad_id, rows_B.device)
        copies_B = torch.tensor(copies, device=rows_B.device)
        with cache.prefilling(rows, copies_B if len(copies) < sum(copies) else None):
            hidden_BD = _hidden(model, cache, ids_BP, mask_BP.long())[:, -1].clone()
        below.keep(rows_B[rows], cache.prompt_length, copies_B)
        parts.append(hidden_BD.repeat_interleave(copies_B, 0))
    for _ in range(len(starts), passes):
        model.base_model(input_ids=rows_B.new_zeros(1, 1), use_cache=False)  # in step with the other processes
    cache.prefilled()
    hidden_BD = torch.cat(parts)
    return F.pad(hidden_BD, (0, 0, len(prompts) - len(hidden_BD), 0))  # abridged: the others are not known


def _hidden(model: PreTrainedModel, cache: KVCache, ids_BN: Tensor, mask_BL: Tensor) -> Tensor:
    """Hidden states (B, N, D) of the last N positions; those before are in the cache."""
    hidden: Tensor = model.base_model(
        input_ids=ids_BN,
        attention_mask=cache.mask(mask_BL, ids_BN.shape[1]),
        position_ids=positions(mask_BL)[:, -ids_BN.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return hidden


def _draw_next(
    model: PreTrainedModel, hidden_BD: Tensor, sampling: Sampling, uniform_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids (B), and the log-probs they were drawn with (B, fp32)."""
    product_BV = model.get_output_embeddings()(hidden_BD).float()
    logits_BV = logits_transform(model.config).apply_(product_BV, sampling.temperature)
    # softmax, not the exponential of the log-probs: on a CPU that takes ten times as long
    drawn_B1 = draw(logits_BV.softmax(-1), uniform_B1)
    return drawn_B1[:, 0], logits_BV.log_softmax(-1).gather(1, drawn_B1)[:, 0]


def draw(probabilities_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """A token id (B, 1) from each row's distribution: where its cumulative sum passes a uniform number, fp64.

    One random number a row: `multinomial` takes one a token of the vocabulary, on a CPU as long as the model does.
    """
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    last = probabilities_BV.shape[1] - 1  # rounding can make the number the whole sum
    return torch.tensor(drawn_B1.clamp(max=last).tolist(), device=probabilities_BV.device)
