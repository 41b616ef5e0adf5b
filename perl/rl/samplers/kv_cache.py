"""A KV cache of a known size: keys and values are written in place.

transformers' dynamic cache joins old and new at every token, which copies the whole cache each time; its static
one attends over the whole capacity. This one does neither. What attention sees are positions in multiples of
`STEP`, laid out densely, so that its products are of few shapes (oneDNN keeps some half a megabyte for each that
it has seen) and need no copy; models that must see what is filled and no more are given a view of that. And
prompts are written a few rows at a time, so that their activations are never those of the whole batch.
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
"""Positions by which the visible part grows; those not filled yet are zero, and masked."""


@dataclass
class Window:
    """Rows whose prompts are being written, shared by all layers; None outside a prefill."""

    rows: slice
    """Of the cache."""
    sources: Tensor | None
    """Which row of the prefill each of them is, int64; None: its own."""


class Layer(DynamicLayer):
    """Keys and values (B, heads, positions, head size) of one layer, `filled` positions of them written.

    Both are views of memory for the whole capacity, which is reserved once.
    """

    elsewhere = 0
    """Of these positions, the first ones that another tensor holds."""

    def __init__(self, batch: int, prompt_length: int, capacity: int, step: int | None) -> None:
        super().__init__()
        self._batch, self._prompt_length, self._capacity, self._step = batch, prompt_length, capacity, step
        self.window: Window | None = None
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory, now that the widths are known."""
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
        """The positions that are laid out where so many are needed."""
        return (
            self._capacity if self._step is None else min(self._capacity, -(-positions // self._step) * self._step)
        )

    def _lay_out(self, length: int) -> None:
        """Make room for so many positions, more than there are."""
        for name in ("keys", "values"):
            before = getattr(self, name)[:, :, : self.filled].clone()
            rows, heads, written, size = before.shape  # of positions skipped there may be more than were laid out
            after = self._view(name, rows, heads, length, size).zero_()
            after[:, :, :written] = before
            setattr(self, name, after)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new positions; return all that attention is to see."""
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
        """The positions that attention sees when so many are filled."""
        return end if self._step is None else self._room(end)

    def _write_prompts(self, key_states: Tensor, value_states: Tensor, window: Window) -> None:
        start = self._prompt_length - key_states.shape[-2]  # what is before stays zero
        for whole, new in ((self.keys, key_states), (self.values, value_states)):
            whole[window.rows, :, start : self._prompt_length] = (
                new if window.sources is None else new.index_select(0, window.sources)
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions attention will see, from which on."""
        if self.window is not None:
            return query_length, 0
        return self.elsewhere + self._seen(self.filled - self.elsewhere + query_length), 0

    def get_seq_length(self) -> int:
        """The positions filled."""
        return self.filled

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        for name in ("keys", "values"):
            setattr(self, name, selected(getattr(self, name), indices, self.filled))


def selected(whole: Tensor, rows: Tensor, filled: int) -> Tensor:
    """These rows, moved to the start of their memory; `filled` positions of them."""
    kept = whole[: len(rows)]
    kept[:, :, :filled] = whole[:, :, :filled].index_select(0, rows)
    return kept


def grows_in_steps(model: PreTrainedModel) -> bool:
    """Whether attention may be shown positions that are not filled yet, laid out densely."""
    return model.device.type == "cpu" and can_compile_fullgraph(model)


class KVCache(Cache):
    """The cache of one batch, for models whose layers all hold keys and values.

    Args:
        model: whose layers it is for.
        batch: rows.
        prompt_length: positions of the prompts, padded on the left.
        completion_length: positions of the completions at most.
    """

    def __init__(self, model: PreTrainedModel, batch: int, prompt_length: int, completion_length: int) -> None:
        count = backbone_of(model.config).cache_layers
        # Elsewhere the kernels take views as they are, and are the faster for having no mask.
        step = STEP if grows_in_steps(model) else None
        super().__init__(layers=[self._layer(batch, prompt_length, completion_length, step) for _ in range(count)])
        self.prompt_length = prompt_length

    def _layer(self, batch: int, prompt_length: int, completion_length: int, step: int | None) -> Layer:
        return Layer(batch, prompt_length, prompt_length + completion_length, step)

    @contextlib.contextmanager
    def prefilling(self, rows: slice, sources: Tensor | None = None) -> Iterator[None]:
        """Inside, the model computes prompts of these rows, padded on the left to as many columns as they need.

        Args:
            rows: of the cache.
            sources: which of the computed rows each of them is, int64; None: its own.
        """
        for layer in self.layers:
            layer.window = Window(rows, sources)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.window = None

    def mask(self, mask_BL: Tensor, new: int) -> Tensor:
        """The mask as long as what attention will see: models that add ALiBi count its positions by the mask.

        Args:
            mask_BL: of the positions that are filled, the `new` ones included.
            new: positions that are computed now.
        """
        seen, _ = self.get_mask_sizes(new, 0)
        return F.pad(mask_BL, (0, seen - mask_BL.shape[1]))

    def prefilled(self) -> None:
        """All prompts are written; what comes now are completions."""
        self.skip(self.prompt_length)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only; the places of the others are free."""
        for layer in self.layers:
            layer.batch_select_indices(rows)

    def skip(self, positions: int) -> None:
        """Pretend that so many positions more were filled."""
        for layer in self.layers:
            layer.filled += positions


class EncoderDecoderKVCache(EncoderDecoderCache):
    """The caches of an encoder-decoder: of what its decoder writes, and of the encoder's pass over the prompts.

    Args:
        model, batch, prompt_length, completion_length: as of `KVCache`.
        start_length: positions of the prompts that the decoder reads, the last ones.
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
        """As of `KVCache`; inside, the encoder's keys and values are computed."""
        self.is_updated: dict[int, bool] = {}
        with (
            self.self_attention_cache.prefilling(rows, sources),
            self.cross_attention_cache.prefilling(rows, sources),
        ):
            yield

    def mask(self, mask_BL: Tensor, new: int) -> Tensor:
        """The decoder's part of a mask, as of `KVCache`."""
        if not self.get_seq_length():
            return mask_BL[:, -self._start_length :]
        return self.self_attention_cache.mask(mask_BL[:, self.cross_attention_cache.prompt_length :], new)

    def prefilled(self) -> None:
        """As of `KVCache`."""
        self.self_attention_cache.prefilled()
        self.cross_attention_cache.prefilled()

    def keep(self, rows: Tensor) -> None:
        """As of `KVCache`."""
        self.self_attention_cache.keep(rows)
        self.cross_attention_cache.keep(rows)

    def skip(self, positions: int) -> None:
        """As of `KVCache`."""
        self.self_attention_cache.skip(positions)
