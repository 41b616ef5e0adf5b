"""A KV cache that holds the shared prompt of several completions once, and attention over prompt and completions.

Sampling a token reads the whole cache: for four completions of 64 tokens to a prompt of 128, a cache by rows has
768 positions and this one 384. In addition, a prompt is multiplied by the queries of all its completions at once.

Axis letters, in addition to those of `perl.rl.samplers.decode_attention`: C different prompts, K completion slots
per prompt, P prompt positions, T completion positions, N query heads per key head, X products of a batch.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perl.measure.probe import mark
from perl.rl.samplers.kv_cache import KVCache, Layer, Window, selected
from perl.system.device import to_device


class SharedPromptsLayer(Layer):
    """One layer: `keys` and `values` hold the completions, `prompts` the prompts (C, G, P, D)."""

    prompts: tuple[Tensor, Tensor]

    def __init__(self, cache: "SharedPromptsCache", batch: int, completion_length: int, step: int | None) -> None:
        super().__init__(batch, 0, completion_length, step)
        # A reference cycle would keep the memory until the garbage collector runs.
        self._cache = cast("SharedPromptsCache", weakref.proxy(cache))
        self.elsewhere = cache.prompt_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory, once the widths are known."""
        super().lazy_initialization(key_states, value_states)
        count, length = len(self._cache.copies), self._cache.prompt_length
        keys, values = (
            one.new_zeros(count, one.shape[1], length, one.shape[3]) for one in (key_states, value_states)
        )
        self.prompts = keys, values
        mark("kv_cache", self.prompts)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See `Layer`, but without the prompts, for which attention asks the cache."""
        keys, values = super().update(key_states, value_states)
        self._cache.newest = (keys, self) if self.window is None else None
        return keys, values

    def _write_prompts(self, key_states: Tensor, value_states: Tensor, window: Window) -> None:
        start = self.elsewhere - key_states.shape[-2]  # earlier positions stay zero
        for whole, new in zip(self.prompts, (key_states, value_states), strict=True):
            whole[window.rows, :, start:] = new

    def keep_prompts(self, prompts: Tensor) -> None:
        """Keep only these prompts."""
        keys, values = (selected(one, prompts, self.elsewhere) for one in self.prompts)
        self.prompts = keys, values

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of each row's prompt and completion, (B, G, P + T, D)."""
        of_prompts = (one.index_select(0, self._cache.prompt_B) for one in self.prompts)
        keys, values = (torch.cat(both, 2) for both in zip(of_prompts, (key, value), strict=True))
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float) -> Tensor:
        """See `decode_attention.attend`; key and value cover the completions, `added` all positions."""
        cache, (rows, heads), groups = self._cache, query.shape[:2], key.shape[1]
        keys_XPD, values_XPD = (one.flatten(0, 1) for one in self.prompts)
        query_BGND = query.reshape(rows, groups, heads // groups, -1)
        of_prompts = _product(cache.by_prompt(query_BGND), keys_XPD.transpose(1, 2), scale)
        of_rows = _product(key.flatten(0, 1), query_BGND.flatten(0, 1).transpose(1, 2), scale).transpose(1, 2)
        scores_XNL = torch.cat([cache.by_row(of_prompts, groups), of_rows], 2)
        if added is not None:
            scores_XNL += added.transpose(1, 2)
        weights_XNP, weights_XNT = torch.split(scores_XNL.softmax(-1), [self.elsewhere, key.shape[2]], 2)
        of_prompts = cache.by_prompt(torch.unflatten(weights_XNP, 0, (rows, groups))) @ values_XPD
        result_XND = torch.baddbmm(cache.by_row(of_prompts, groups), weights_XNT, value.flatten(0, 1))
        return result_XND.view(rows, 1, heads, -1)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


class SharedPromptsCache(KVCache):
    """The cache of one batch in which rows of the same prompt are adjacent.

    It requires that all layers of the model attend through transformers' function, and that `fast_decoding` is
    active.

    Args:
        model: the model that uses the cache.
        copies: number of rows of each prompt.
        prompt_length: positions of the prompts, padded on the left.
        completion_length: maximum positions of the completions.

    Attributes:
        newest: the keys of the layer that was last written to, as passed to attention, and the layer.
        prompt_B: index of each row's prompt, int64.
    """

    def __init__(
        self, model: PreTrainedModel, copies: Sequence[int], prompt_length: int, completion_length: int
    ) -> None:
        self.prompt_length, self._device = prompt_length, model.device
        self.newest: tuple[Tensor, SharedPromptsLayer] | None = None
        self._arrange([prompt for prompt, count in enumerate(copies) for _ in range(count)])
        super().__init__(model, sum(copies), prompt_length, completion_length)

    def _layer(self, batch: int, prompt_length: int, completion_length: int, step: int | None) -> Layer:
        return SharedPromptsLayer(self, batch, completion_length, step)

    def _arrange(self, prompts: list[int]) -> None:
        """Record the prompt of each row."""
        self._prompts, self.copies = prompts, [prompts.count(prompt) for prompt in sorted(set(prompts))]
        self._places = max(self.copies)
        slots: list[int] = []
        for prompt, count in enumerate(self.copies):
            slots += range(prompt * self._places, prompt * self._places + count)
        self._full = len(slots) == len(self.copies) * self._places
        self.prompt_B, self._slots_B = (to_device(one, self._device) for one in (prompts, slots))

    @contextlib.contextmanager
    def prefilling(self, rows: slice, sources: Tensor | None = None) -> Iterator[None]:
        """See `KVCache`; each prompt is stored once."""
        prompts = slice(self._prompts[rows.start], self._prompts[rows.stop - 1] + 1)
        with super().prefilling(prompts):
            yield

    def keep(self, rows: Tensor) -> None:
        """See `KVCache`; prompts without rows are removed, too."""
        super().keep(rows)
        left = [self._prompts[row] for row in rows.tolist()]
        kept = sorted(set(left))
        if len(kept) < len(self.copies):
            for layer in self.layers:
                layer.keep_prompts(to_device(kept, self._device))
        self._arrange([kept.index(prompt) for prompt in left])

    def layer_of(self, key: Tensor) -> SharedPromptsLayer | None:
        """Return the layer of these keys; None if they are complete, as during the prefill."""
        return None if self.newest is None or self.newest[0] is not key else self.newest[1]

    def by_prompt(self, of_BGN: Tensor) -> Tensor:
        """Return (B, G, N, …) as (C · G, K · N, …): a prompt's completions adjacent, zeros in empty slots."""
        if not self._full:
            padded = of_BGN.new_zeros(len(self.copies) * self._places, *of_BGN.shape[1:])
            of_BGN = padded.index_copy_(0, self._slots_B, of_BGN)
        of_CKGN = torch.unflatten(of_BGN, 0, (-1, self._places))
        return of_CKGN.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def by_row(self, of_XQ: Tensor, groups: int) -> Tensor:
        """Return the result of `by_prompt` to the layout (B · G, N, …)."""
        of_CGKN = torch.unflatten(torch.unflatten(of_XQ, 0, (-1, groups)), 2, (self._places, -1))
        of_BGN = of_CGKN.transpose(1, 2).flatten(0, 1)
        return (of_BGN if self._full else of_BGN[self._slots_B]).flatten(0, 1)
