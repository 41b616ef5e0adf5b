"""Sampling in this process with a KV cache, which keeps the log-prob with which each token was sampled.

A hand-written loop instead of `generate`: it keeps (B,) log-probs and values per step where `generate` would
return logits of B x T x V, rows that ended leave the batch, and equal prompts are computed once.

Axis letters: B completions, P prompt positions, T completion positions, V vocabulary, D hidden, E end tokens.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from perl.backbones.encoder_decoder_format import START
from perl.backbones.logits import logits_transform
from perl.backbones.padding import left_pad
from perl.rl.samplers.base import Read, Sampler, Samples, Sampling, Share
from perl.rl.samplers.decode_attention import fast_decoding
from perl.rl.samplers.kv_cache import EncoderDecoderKVCache, KVCache, grows_in_steps
from perl.rl.samplers.shared_prompts_cache import SharedPromptsCache
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.system.device import to_device

KEEP_UNTIL = 0.75
"""Finished completions leave the batch once at most this share is unfinished, because the others are copied
then."""

LOOK_EVERY = 16
"""Tokens between the checks which completions have ended on a GPU, because the host waits for the answer. Tokens
sampled after the end are discarded. On a CPU this is checked after each token: there is no wait, and a row's step
costs more."""

Groups = list[tuple[list[int], int]]
"""Different prompts, and the number of adjacent rows of each in the batch."""


class LocalSampler(Sampler):
    """Samples with the roles themselves, so that it always has their current weights.

    A completion depends on the generator and its prompt's row, not on the other prompts of the batch.
    """

    exact: ClassVar[bool] = True

    def sync(self, role: Role) -> None:
        """Do nothing: there is no copy of the weights."""

    @torch.no_grad()
    def draw(
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
        read: Read | None = None,
    ) -> Samples:
        """See `Sampler`; equal prompts are computed once."""
        rows, total = share or Share(list(range(len(prompts))), len(prompts))
        uniform_BT = torch.rand(
            total, sampling.max_new_tokens, dtype=torch.float64, generator=generator, device=generator.device
        )[to_device(rows, generator.device)]
        with self.roles.sampling(role) as seen:
            drawing = self.drawing(prompts, sampling, uniform_BT, read, seen)
            with fast_decoding(self.roles.device, drawing.cache):
                drawing.prefill()
                for step in drawing.steps():
                    drawing.draw(step)
                    if not drawing.append(step):
                        break
        return drawing.samples()

    def drawing(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        uniform_BT: Tensor,
        read: Read | None,
        seen: list[Tensor],
    ) -> "Drawing":
        """Return the batch to be sampled."""
        return Drawing(self.roles, prompts, sampling, uniform_BT, read, seen)


class Drawing:
    """A batch that is being sampled, one token per step.

    Args:
        uniform_BT: the random number that determines each token, fp64.
        seen: receives the shared blocks' output of each forward pass, see `Roles.sampling`.
    """

    def __init__(
        self,
        roles: Roles,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        uniform_BT: Tensor,
        read: Read | None,
        seen: list[Tensor],
    ) -> None:
        self.prompts, self.sampling, self.length = prompts, sampling, sampling.max_new_tokens
        self._roles, self._uniform_BT, self._read = roles, uniform_BT, read
        device, count = roles.device, len(prompts)
        self._prompt_ids_BP, self._prompt_mask_BP = left_pad(prompts, sampling.pad_id, device)
        self._ids_BT = torch.full((count, self.length), sampling.pad_id, device=device)
        self._log_probs_BT = torch.zeros((count, self.length), device=device)
        self._read_BT = torch.zeros_like(self._log_probs_BT) if read is not None else None
        self._ends_E = to_device(sampling.end_ids, device)
        self._lengths_B = torch.zeros(count, dtype=torch.int64, device=device)  # of the completions that ended
        self._lengths = [0] * count  # the same on the host, from the last check
        self._look_every = 1 if device.type == "cpu" else LOOK_EVERY
        # Rows of similar length are together in the cache, those of the same prompt adjacent.
        self._order = sorted(range(count), key=lambda row: (len(prompts[row]), prompts[row]))
        self._rows_B = to_device(self._order, device)
        self.mask_BL = self._prompt_mask_BP[self._rows_B].long()
        self._start = self._prompt_ids_BP.shape[1]
        self.model = roles.model()
        self.cache = _new_cache(roles, [list(prompts[row]) for row in self._order], self._start, self.length)
        self._lower = _LowerHidden(seen, count, self._start + self.length)
        self._hidden_BD: Tensor  # that the next tokens are drawn from

    def steps(self) -> Iterable[int]:
        """Return the completion positions that are sampled."""
        return range(self.length)

    def prefill(self) -> None:
        """Compute the prompts, equal ones once, a few at a time."""
        ordered = [list(self.prompts[row]) for row in self._order]
        groups = [(prompt, len(list(same))) for prompt, same in itertools.groupby(ordered)]
        starts = range(0, len(groups), self.sampling.prompts_at_once)
        # Before the loop: a process with fewer passes would ask while others still compute.
        passes = self._roles.engine.together(len(starts))
        parts, row = [], 0
        for start in starts:
            some = groups[start : start + self.sampling.prompts_at_once]
            rows = slice(row, row + sum(copies for _, copies in some))
            parts.append(self.prefill_groups(some, rows))
            row = rows.stop
        for _ in range(len(starts), passes):  # in step with the other processes
            ids_11 = self._rows_B.new_zeros(1, 1)
            self._roles.trunk(ids_11, torch.ones_like(ids_11, dtype=torch.bool))
        self.cache.prefilled()
        self._hidden_BD = torch.cat(parts)

    def prefill_groups(self, groups: Groups, rows: slice) -> Tensor:
        """Compute some prompts; return the hidden states (B, D) at the end of each of these rows of the batch."""
        device = self._rows_B.device
        sources_B = to_device([place for place, (_, copies) in enumerate(groups) for _ in range(copies)], device)
        ids_BP, mask_BP = left_pad([prompt for prompt, _ in groups], self.sampling.pad_id, device)
        with self.cache.prefilling(rows, sources_B if len(groups) < len(sources_B) else None):
            hidden_BD = self._next_hidden(ids_BP, mask_BP.long()).clone()
        self._lower.keep(self._rows_B[rows], self._start, sources_B)
        return hidden_BD.index_select(0, sources_B)

    def _next_hidden(self, ids_BN: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the hidden states (B, D) after the newest N positions; earlier ones are in the cache."""
        attention_mask = self.cache.mask(mask_BL, ids_BN.shape[1])
        return self._roles.backbone.extend(self.model, ids_BN, mask_BL, attention_mask, self.cache)[:, -1]

    def draw(self, step: int) -> None:
        """Sample each row's next token."""
        rows_B = self._rows_B
        self._ids_BT[rows_B, step], self._log_probs_BT[rows_B, step] = _draw_next(
            self.model, self._hidden_BD, self.sampling, self._uniform_BT[rows_B, step, None]
        )
        if self._read_BT is not None and self._read is not None:
            self._read_BT[rows_B, step] = self._read(self._hidden_BD)[:, 0]
        if self.sampling.end_ids:
            ends_B = (self._ids_BT[rows_B, step, None] == self._ends_E).any(1)
            lengths_B = self._lengths_B[rows_B]
            self._lengths_B[rows_B] = torch.where(ends_B & (lengths_B == 0), step + 1, lengths_B)

    def append(self, step: int) -> bool:
        """Compute the sampled tokens if the result is used; return whether more are to be sampled."""
        last = step + 1 == self.length
        looks = last or (step + 1) % self._look_every == 0
        if looks and self.sampling.end_ids:
            self._lengths = self._lengths_B.tolist()
        going = [place for place, row in enumerate(self._order) if not self._lengths[row]]
        # If the base is sharded, all processes continue until every completion in every process has ended.
        done = last or (looks and not self._roles.engine.together(len(going)))
        if done and self._lower.states_BLD is None:
            return False  # nothing uses the last tokens' hidden states
        self.mask_BL = F.pad(self.mask_BL, (0, 1), value=1)
        ids_B1 = self._ids_BT[self._rows_B, step : step + 1]
        self._hidden_BD = self._next_hidden(ids_B1, self.mask_BL)
        self._lower.keep(self._rows_B, self._start + step + 1)
        if not done and 0 < len(going) <= KEEP_UNTIL * len(self._order):
            self._keep(going)
        return not done

    def _keep(self, going: list[int]) -> None:
        """Continue with only these places of the batch."""
        places = to_device(going, self._rows_B.device)
        self._order = [self._order[place] for place in going]
        self._rows_B, self.mask_BL = self._rows_B[places], self.mask_BL[places]
        self._hidden_BD = self._hidden_BD[places]
        self.cache.keep(places)

    def samples(self) -> Samples:
        """Return the sampled completions."""
        device = self._rows_B.device
        lengths = [one or self.length for one in self._lengths]
        mask_BT = torch.arange(self.length, device=device) < to_device(lengths, device)[:, None]
        # Finished rows continued for a while, until enough of them could be removed together.
        ids_BT = self._ids_BT.masked_fill(~mask_BT, self.sampling.pad_id)
        return Samples(
            ids_BL=torch.cat([self._prompt_ids_BP, ids_BT], dim=1),
            mask_BL=torch.cat([self._prompt_mask_BP, mask_BT], dim=1),
            prompt_lengths=[len(prompt) for prompt in self.prompts],
            completion_lengths=lengths,
            ended_B=self._lengths_B > 0,
            sampler_log_probs_BT=self._log_probs_BT.masked_fill(~mask_BT, 0.0),
            read_BT=None if self._read_BT is None else self._read_BT.masked_fill(~mask_BT, 0.0),
            lower_hidden_BLD=self._lower.states_BLD,
        )


def _new_cache(
    roles: Roles, prompts: list[list[int]], prompt_length: int, length: int
) -> KVCache | EncoderDecoderKVCache:
    """Return the cache for a batch of these prompts, equal ones adjacent."""
    model, prompt = roles.model(), prompts[0]
    if roles.backbone.encodes_prompts:
        start_length = len(prompt) - prompt.index(START)
        return EncoderDecoderKVCache(model, len(prompts), prompt_length, length, start_length=start_length)
    copies = [len(list(same)) for _, same in itertools.groupby(prompts)]
    places = len(copies) * max(copies)  # slots that are computed, some empty if rows per prompt differ
    if roles.shares_prompts and grows_in_steps(model) and len(copies) < len(prompts) and places < 2 * len(prompts):
        return SharedPromptsCache(model, copies, prompt_length, length)
    return KVCache(model, len(prompts), prompt_length, length)


class _LowerHidden:
    """The shared blocks' output at each position, kept during sampling.

    The reference, the reward model and the critic, and every pass over the rollout, start from it.
    """

    def __init__(self, seen: list[Tensor], rows: int, length: int) -> None:
        self._seen, self._rows, self._length = seen, rows, length
        self.states_BLD: Tensor | None = None
        """None if there are no such blocks, or only an encoder has them."""

    def keep(self, rows_B: Tensor, end: int, sources_B: Tensor | None = None) -> None:
        """Keep the last output of these rows as the columns up to `end`.

        Args:
            rows_B: their rows in the samples.
            sources_B: the computed row for each of them; None: the same order.
        """
        if not self._seen:
            return
        (states_BND,) = self._seen
        if self.states_BLD is None:
            self.states_BLD = states_BND.new_zeros(self._rows, self._length, states_BND.shape[2])
        if sources_B is not None:
            states_BND = states_BND.index_select(0, sources_B)
        self.states_BLD[rows_B, end - states_BND.shape[1] : end] = states_BND


def _draw_next(
    model: PreTrainedModel, hidden_BD: Tensor, sampling: Sampling, uniform_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sampled token ids (B) and their log-probs (B, fp32)."""
    product_BV = model.get_output_embeddings()(hidden_BD).float()
    logits_BV = logits_transform(model.config).apply_(product_BV, sampling.temperature)
    # softmax, because the exponential of the log-probs takes ten times as long on a CPU
    drawn_B1 = draw(logits_BV.softmax(-1), uniform_B1)
    return drawn_B1[:, 0], logits_BV.log_softmax(-1).gather(1, drawn_B1)[:, 0]


def draw(probabilities_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """Return a token id (B, 1) per row: where the distribution's cumulative sum passes a uniform number, fp64.

    It needs one random number per row; `multinomial` uses one per vocabulary token, which takes as long as the
    model on a CPU.
    """
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    return drawn_B1.clamp(max=probabilities_BV.shape[1] - 1)  # by rounding the number can equal the whole sum
