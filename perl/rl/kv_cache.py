"""A KV cache of a known size: keys and values are written in place.

transformers' dynamic cache joins old and new at every token, which copies the whole cache each time; its static
one attends over the whole capacity. This one does neither: attention sees a view of what is filled. And prompts
are written a few rows at a time, so that their activations are never those of the whole batch.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from perl.measure.probe import mark


@dataclass
class _Window:
    """Rows whose prompts are being written, shared by all layers; None outside a prefill."""

    rows: slice
    """Of the cache."""
    copies: Tensor | None
    """How often each row of the prefill stands in the cache, int64; None: once."""


class _Layer(DynamicLayer):
    """Keys and values (B, heads, capacity, head size) of one layer, `filled` positions of them written."""

    def __init__(self, batch: int, prompt_length: int, capacity: int) -> None:
        super().__init__()
        self._batch, self._prompt_length, self._capacity = batch, prompt_length, capacity
        self.window: _Window | None = None
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory, now that the widths are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        heads = key_states.shape[1]
        self.keys = key_states.new_empty(self._batch, heads, self._capacity, key_states.shape[-1])
        self.values = value_states.new_empty(self._batch, heads, self._capacity, value_states.shape[-1])
        self.is_initialized = True
        mark("kv_cache", [self.keys, self.values])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new positions; return all that attention is to see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.window is not None:
            self._write_prompts(key_states, value_states, self.window)
            return key_states, value_states
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _write_prompts(self, key_states: Tensor, value_states: Tensor, window: _Window) -> None:
        start = self._prompt_length - key_states.shape[-2]
        for whole, new in ((self.keys, key_states), (self.values, value_states)):
            rows = whole[window.rows]
            rows[:, :, :start] = 0  # masked, but what is there is multiplied by 0, and NaN stays NaN
            rows[:, :, start : self._prompt_length] = (
                new if window.copies is None else new.repeat_interleave(window.copies, 0)
            )

    def get_seq_length(self) -> int:
        """The positions filled."""
        return self.filled

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        for name in ("keys", "values"):
            whole = getattr(self, name)
            kept = whole[: len(indices)]
            kept[:, :, : self.filled] = whole[:, :, : self.filled].index_select(0, indices)
            setattr(self, name, kept)


class KVCache(Cache):
    """The cache of one batch, for models whose layers all hold keys and values.

    Args:
        model: whose layers it is for.
        batch: rows.
        prompt_length: positions of the prompts, padded on the left.
        answer_length: positions of the answers at most.
    """

    def __init__(self, model: PreTrainedModel, batch: int, prompt_length: int, answer_length: int) -> None:
        count = model.config.get_text_config().num_hidden_layers
        capacity = prompt_length + answer_length
        super().__init__(layers=[_Layer(batch, prompt_length, capacity) for _ in range(count)])
        self._prompt_length = prompt_length

    @contextlib.contextmanager
    def prefilling(self, rows: slice, copies: Tensor | None = None) -> Iterator[None]:
        """Inside, the model computes prompts of these rows, padded on the left to as many columns as they need.

        Args:
            rows: of the cache.
            copies: how often each computed row stands there, side by side, int64; None: once.
        """
        for layer in self.layers:
            layer.window = _Window(rows, copies)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.window = None

    def prefilled(self) -> None:
        """All prompts are written; what comes now are answers."""
        self.skip(self._prompt_length)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only; the places of the others are free."""
        for layer in self.layers:
            layer.batch_select_indices(rows)

    def skip(self, positions: int) -> None:
        """Pretend that so many positions more were filled."""
        for layer in self.layers:
            layer.filled += positions
