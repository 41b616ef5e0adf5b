"""Sampling in this process with a KV cache, keeping the log-probability each token was drawn with.

A hand-written loop instead of `generate`: it keeps (B,) log-probs and values a step where `generate` would hand
back logits of B x T x V, rows that ended leave the batch, and equal prompts are computed once.

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
"""Completions that ended leave the batch once so few of it go on, as a share: all that stay are copied then."""

LOOK_EVERY = 16
"""Tokens after which a GPU is asked which completions have ended, as the host waits for the answer. What those are
given in between is thrown away. A CPU is asked after each token: nobody waits, and a row's step costs more."""

Groups = list[tuple[list[int], int]]
"""Different prompts, and how often each stands in the batch, side by side."""


class LocalSampler(Sampler):
    """Draws with the roles themselves, so that whatever they learn it draws with.

    What is drawn follows from the generator and a prompt's place, whatever stands beside it.
    """

    exact: ClassVar[bool] = True

    def sync(self, role: Role) -> None:
        """Nothing to do: there is no copy of the weights."""

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
        """The batch to be drawn."""
        return Drawing(self.roles, prompts, sampling, uniform_BT, read, seen)


class Drawing:
    """A batch while it is drawn, a token a step.

    Args:
        uniform_BT: the random number that decides each token, fp64.
        seen: where each forward leaves what the shared blocks made of it, as `Roles.sampling` says.
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
        self._lengths = [0] * count  # the same when they were last looked at
        self._look_every = 1 if device.type == "cpu" else LOOK_EVERY
        # Rows of like length stand together in the cache, those of the same prompt side by side.
        self._order = sorted(range(count), key=lambda row: (len(prompts[row]), prompts[row]))
        self._rows_B = to_device(self._order, device)
        self.mask_BL = self._prompt_mask_BP[self._rows_B].long()
        self._start = self._prompt_ids_BP.shape[1]
        self.model = roles.model()
        self.cache = _new_cache(roles, [list(prompts[row]) for row in self._order], self._start, self.length)
        self._lower = _LowerHidden(seen, count, self._start + self.length)
        self._hidden_BD: Tensor  # that the next tokens are drawn from

    def steps(self) -> Iterable[int]:
        """The completion positions that are drawn."""
        return range(self.length)

    def prefill(self) -> None:
        """Compute the prompts, equal ones once, some at a time."""
        ordered = [list(self.prompts[row]) for row in self._order]
        groups = [(prompt, len(list(same))) for prompt, same in itertools.groupby(ordered)]
        starts = range(0, len(groups), self.sampling.prompts_at_once)
        # Asked first: who has fewer would ask while others compute.
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
        """Compute some prompts; the hidden states (B, D) after each of these rows of the batch."""
        device = self._rows_B.device
        sources_B = to_device([place for place, (_, copies) in enumerate(groups) for _ in range(copies)], device)
        ids_BP, mask_BP = left_pad([prompt for prompt, _ in groups], self.sampling.pad_id, device)
        with self.cache.prefilling(rows, sources_B if len(groups) < len(sources_B) else None):
            hidden_BD = self._next_hidden(ids_BP, mask_BP.long()).clone()
        self._lower.keep(self._rows_B[rows], self._start, sources_B)
        return hidden_BD.index_select(0, sources_B)

    def _next_hidden(self, ids_BN: Tensor, mask_BL: Tensor) -> Tensor:
        """The hidden states (B, D) after the newest N positions; those before are in the cache."""
        attention_mask = self.cache.mask(mask_BL, ids_BN.shape[1])
        return self._roles.backbone.extend(self.model, ids_BN, mask_BL, attention_mask, self.cache)[:, -1]

    def draw(self, step: int) -> None:
        """Draw each row's next token."""
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
        """Compute the tokens that were drawn, where someone reads that; whether others are to be drawn."""
        last = step + 1 == self.length
        looks = last or (step + 1) % self._look_every == 0
        if looks and self.sampling.end_ids:
            self._lengths = self._lengths_B.tolist()
        going = [place for place, row in enumerate(self._order) if not self._lengths[row]]
        # Where the base is spread over processes, all compute on until every completion of every one has ended.
        done = last or (looks and not self._roles.engine.together(len(going)))
        if done and self._lower.states_BLD is None:
            return False  # nobody reads what is computed of the last tokens
        self.mask_BL = F.pad(self.mask_BL, (0, 1), value=1)
        ids_B1 = self._ids_BT[self._rows_B, step : step + 1]
        self._hidden_BD = self._next_hidden(ids_B1, self.mask_BL)
        self._lower.keep(self._rows_B, self._start + step + 1)
        if not done and 0 < len(going) <= KEEP_UNTIL * len(self._order):
            self._keep(going)
        return not done

    def _keep(self, going: list[int]) -> None:
        """Go on with these places of the batch only."""
        places = to_device(going, self._rows_B.device)
        self._order = [self._order[place] for place in going]
        self._rows_B, self.mask_BL = self._rows_B[places], self.mask_BL[places]
        self._hidden_BD = self._hidden_BD[places]
        self.cache.keep(places)

    def samples(self) -> Samples:
        """All that was drawn."""
        device = self._rows_B.device
        lengths = [one or self.length for one in self._lengths]
        mask_BT = torch.arange(self.length, device=device) < to_device(lengths, device)[:, None]
        # Rows that had ended were drawn on for a while, until enough of them were there to be taken out.
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
    """The cache for a batch of these prompts, equal ones side by side."""
    model, prompt = roles.model(), prompts[0]
    if roles.backbone.encodes_prompts:
        start_length = len(prompt) - prompt.index(START)
        return EncoderDecoderKVCache(model, len(prompts), prompt_length, length, start_length=start_length)
    copies = [len(list(same)) for _, same in itertools.groupby(prompts)]
    places = len(copies) * max(copies)  # that are computed, where not all prompts have as many rows
    if roles.shares_prompts and grows_in_steps(model) and len(copies) < len(prompts) and places < 2 * len(prompts):
        return SharedPromptsCache(model, copies, prompt_length, length)
    return KVCache(model, len(prompts), prompt_length, length)


class _LowerHidden:
    """What the shared blocks make of each position, kept as it comes by.

    The reference, the reward model and the critic, and every pass over the rollout, go on from there.
    """

    def __init__(self, seen: list[Tensor], rows: int, length: int) -> None:
        self._seen, self._rows, self._length = seen, rows, length
        self.states_BLD: Tensor | None = None
        """None where there are no such blocks, or only an encoder has them."""

    def keep(self, rows_B: Tensor, end: int, sources_B: Tensor | None = None) -> None:
        """Keep what was computed last, of these rows the columns up to `end`.

        Args:
            rows_B: their places in the samples.
            sources_B: which of the rows that were computed each of them is; None: its own.
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
    return drawn_B1.clamp(max=probabilities_BV.shape[1] - 1)  # rounding can make the number the whole sum
