"""A KV cache of a known size: keys and values are written in place.

transformers' dynamic cache joins old and new at every token, which copies the whole cache each time; its static
one attends over the whole capacity. This one does neither: attention sees a view of what is filled.
"""

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from perl.measure.probe import mark


class _Layer(DynamicLayer):
    """Keys and values (B, heads, capacity, head size) of one layer, `filled` positions of them written."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory, now that batch and widths are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys = key_states.new_empty(batch, heads, self._capacity, key_states.shape[-1])
        self.values = value_states.new_empty(batch, heads, self._capacity, value_states.shape[-1])
        self.is_initialized = True
        mark("kv_cache", [self.keys, self.values])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new positions; return all that are filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

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
        capacity: positions at most, of prompt and answer.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        count = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[_Layer(capacity) for _ in range(count)])

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only; the places of the others are free."""
        for layer in self.layers:
            layer.batch_select_indices(rows)

    def skip(self, positions: int) -> None:
        """Pretend that so many positions more were filled."""
        for layer in self.layers:
            layer.filled += positions
