"""A KV cache of fixed capacity: keys and values are written in place.

transformers' dynamic cache concatenates old and new keys at every token, which copies the whole cache each time;
its static cache attends over the whole capacity. This one does neither. Attention sees a multiple of `STEP`
positions, laid out densely, so that its products have few shapes (oneDNN keeps about half a megabyte for each
shape) and need no copy; models that must not see unfilled positions get a view of the filled ones. Prompts are
written a few rows at a time, so that the prefill never holds the activations of the whole batch.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from perl.backbones import backbone_of
from perl.measure.probe import mark
from perl.private.transformers import can_compile_fullgraph

STEP = 64
"""Positions by which the visible part grows; unfilled ones are zero and masked."""


@dataclass
class Window:
    """The rows whose prompts are being written, shared by all layers; None outside a prefill."""

    rows: slice
    """Rows of the cache."""
    sources: Tensor | None
    """The row of the prefill for each of them, int64; None: the same order."""


class Layer(DynamicLayer):
    """Keys and values (B, heads, positions, head size) of one layer, of which `filled` positions are written.

    Both are views of memory for the whole capacity, which is reserved once.
    """

    elsewhere = 0
    """The number of first positions that another tensor holds."""

    def __init__(self, batch: int, prompt_length: int, capacity: int, step: int | None) -> None:
        super().__init__()
        self._batch, self._prompt_length, self._capacity, self._step = batch, prompt_length, capacity, step
        self.window: Window | None = None
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory, once the widths are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        length = self._room(self._prompt_length + 1)
        self._memory = {}
        for name, new in (("keys", key_states), ("values", value_states)):
            heads, size = new.shape[1], new.shape[3]
            self._memory[name] = new.new_zeros(self._batch * heads * self._capacity * size)
            setattr(self, name, self._view(name, self._batch, heads, length, size))
        self.is_initialized = True
        mark("kv_cache", self._memory.values())

    def _view(self, name: str, *shape: int) -> Tensor:
        return self._memory[name][: math.prod(shape)].view(shape)

    def _room(self, positions: int) -> int:
        """Return the number of positions to lay out if `positions` are needed."""
        step = self._step
        return self._capacity if step is None else min(self._capacity, -(-positions // step) * step)

    def _lay_out(self, length: int) -> None:
        """Make room for more positions."""
        for name in ("keys", "values"):
            before = getattr(self, name)[:, :, : self.filled].clone()
            rows, heads, written, size = before.shape  # skipped positions may exceed those laid out
            after = self._view(name, rows, heads, length, size).zero_()
            after[:, :, :written] = before
            setattr(self, name, after)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new positions; return all positions that attention should see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.window is not None:
            self._write_prompts(key_states, value_states, self.window)
            return key_states, value_states
        start = self.filled - self.elsewhere
        end = start + key_states.shape[-2]
        if self._room(end) > self.keys.shape[2]:
            self._lay_out(self._room(end))
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.filled += end - start
        seen = self._seen(end)
        return self.keys[:, :, :seen], self.values[:, :, :seen]

    def _seen(self, end: int) -> int:
        """Return the number of positions that attention sees when `end` are filled."""
        return end if self._step is None else self._room(end)

    def _write_prompts(self, key_states: Tensor, value_states: Tensor, window: Window) -> None:
        start = self._prompt_length - key_states.shape[-2]  # earlier positions stay zero
        for whole, new in ((self.keys, key_states), (self.values, value_states)):
            whole[window.rows, :, start : self._prompt_length] = (
                new if window.sources is None else new.index_select(0, window.sources)
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions that attention will see, and the first one."""
        if self.window is not None:
            return query_length, 0
        return self.elsewhere + self._seen(self.filled - self.elsewhere + query_length), 0

    def get_seq_length(self) -> int:
        """Return the number of filled positions."""
        return self.filled

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        for name in ("keys", "values"):
            setattr(self, name, selected(getattr(self, name), indices, self.filled))


def selected(whole: Tensor, rows: Tensor, filled: int) -> Tensor:
    """Return these rows with `filled` positions, moved to the start of their memory."""
    kept = whole[: len(rows)]
    kept[:, :, :filled] = whole[:, :, :filled].index_select(0, rows)
    return kept


def grows_in_steps(model: PreTrainedModel) -> bool:
    """Return whether attention may see unfilled positions, so that the cache is laid out densely."""
    return model.device.type == "cpu" and can_compile_fullgraph(model)


class KVCache(Cache):
    """The cache of one batch, for models whose layers all hold keys and values.

    Args:
        model: the model that uses the cache.
        batch: number of rows.
        prompt_length: positions of the prompts, padded on the left.
        completion_length: maximum positions of the completions.
    """

    def __init__(self, model: PreTrainedModel, batch: int, prompt_length: int, completion_length: int) -> None:
        count = backbone_of(model.config).cache_layers
        # On other devices the kernels accept views, and are faster without a mask.
        step = STEP if grows_in_steps(model) else None
        super().__init__(layers=[self._layer(batch, prompt_length, completion_length, step) for _ in range(count)])
        self.prompt_length = prompt_length

    def _layer(self, batch: int, prompt_length: int, completion_length: int, step: int | None) -> Layer:
        return Layer(batch, prompt_length, prompt_length + completion_length, step)

    @contextlib.contextmanager
    def prefilling(self, rows: slice, sources: Tensor | None = None) -> Iterator[None]:
        """Write the prompts of these rows inside the block, padded on the left to as many columns as they need.

        Args:
            rows: rows of the cache.
            sources: the computed row for each of them, int64; None: the same order.
        """
        for layer in self.layers:
            layer.window = Window(rows, sources)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.window = None

    def mask(self, mask_BL: Tensor, new: int) -> Tensor:
        """Pad the mask to the positions that attention will see: models with ALiBi count positions by the mask.

        Args:
            mask_BL: mask of the filled positions, including the `new` ones.
            new: number of positions that are computed now.
        """
        seen, _ = self.get_mask_sizes(new, 0)
        return F.pad(mask_BL, (0, seen - mask_BL.shape[1]))

    def prefilled(self) -> None:
        """Note that all prompts are written and completions follow."""
        self.skip(self.prompt_length)

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows and free the places of the others."""
        for layer in self.layers:
            layer.batch_select_indices(rows)

    def skip(self, positions: int) -> None:
        """Count this many more positions as filled."""
        for layer in self.layers:
            layer.filled += positions


class EncoderDecoderKVCache(EncoderDecoderCache):
    """The caches of an encoder-decoder: the decoder's own, and that of the encoder's pass over the prompts.

    Args:
        model, batch, prompt_length, completion_length: as in `KVCache`.
        start_length: number of last prompt positions that the decoder reads.
    """

    self_attention_cache: KVCache
    cross_attention_cache: KVCache

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        prompt_length: int,
        completion_length: int,
        start_length: int,
    ) -> None:
        read = prompt_length - start_length
        super().__init__(KVCache(model, batch, start_length, completion_length), KVCache(model, batch, read, 0))
        self._start_length = start_length

    @contextlib.contextmanager
    def prefilling(self, rows: slice, sources: Tensor | None = None) -> Iterator[None]:
        """See `KVCache`; the encoder's keys and values are computed inside the block."""
        self.is_updated: dict[int, bool] = {}
        with (
            self.self_attention_cache.prefilling(rows, sources),
            self.cross_attention_cache.prefilling(rows, sources),
        ):
            yield

    def mask(self, mask_BL: Tensor, new: int) -> Tensor:
        """Return the decoder's part of a mask, as in `KVCache`."""
        if not self.get_seq_length():
            return mask_BL[:, -self._start_length :]
        return self.self_attention_cache.mask(mask_BL[:, self.cross_attention_cache.prompt_length :], new)

    def prefilled(self) -> None:
        """See `KVCache`."""
        self.self_attention_cache.prefilled()
        self.cross_attention_cache.prefilled()

    def keep(self, rows: Tensor) -> None:
        """See `KVCache`."""
        self.self_attention_cache.keep(rows)
        self.cross_attention_cache.keep(rows)

    def skip(self, positions: int) -> None:
        """See `KVCache`."""
        self.self_attention_cache.skip(positions)
