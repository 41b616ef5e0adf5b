"""Attention of one new token per row over cached keys and values, on a CPU.

torch's own kernel is slow for a single query: it multiplies head by head, and vectors are its slowest shape. Two
batched products take at most half the time. They round scores to the base's dtype where the kernel keeps fp32,
which matters if scores are large. Therefore every layer is compared with the kernel once per sampling, and uses
the kernel if the two differ by more than rounding.

If a cache holds prompts once for several rows, attention is that of `SharedPromptsCache`.

Axis letters: B rows, H query heads, G key and value heads, L positions, D head size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perl.backbones.shared_prompts import KERNEL, using
from perl.rl.samplers.shared_prompts_cache import SharedPromptsCache

OTHER_WORK = ("softcap", "position_bias", "cache", "output_attentions")
"""Further options of that function, for which it is called."""


def tolerance(dtype: torch.dtype) -> float:
    """Return the allowed difference of two computations of the same result, as a share of its norm."""
    return max(2 * torch.finfo(dtype).eps, 1e-5)


def _suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, elsewhere: int) -> bool:
    """Return whether this is one token per row over a dense cache, which has few shapes; others would be copied.

    Args:
        elsewhere: number of positions before those of key and value, which are stored elsewhere.
    """
    dense = key.is_contiguous() and value.is_contiguous()
    one_token = query.shape[2] == 1 and query.shape[1] % key.shape[1] == 0 and not query.requires_grad
    return dense and one_token and (mask is None or mask.shape[1:] == (1, 1, elsewhere + key.shape[2]))


class _OneToken:
    """Replacement of transformers' function, which is still called for everything but one token per row."""

    def __init__(self, kernel: Callable[..., Any], cache: SharedPromptsCache | None = None) -> None:
        self._kernel, self._cache = kernel, cache
        self._agrees: dict[nn.Module, bool] = {}
        self._mask: tuple[Tensor, Tensor] | None = None
        """The last mask, which all layers share, and the term that it adds to the scores."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """See transformers: query (B, H, 1, D), key and value (B, G, L, D) to (B, 1, H, D)."""
        asked = [rest.get(name) for name in OTHER_WORK]
        plain = all(one is None or one is False for one in asked)
        shared = None if self._cache is None else self._cache.layer_of(key)
        elsewhere = 0 if shared is None else shared.elsewhere
        result, agrees = None, self._agrees.get(module)
        if plain and agrees is not False and _suits(query, key, value, attention_mask, elsewhere):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            added = self._added(attention_mask, query, key)
            result = (attend if shared is None else shared.attend)(query, key, value, added, scale)
            if agrees:
                return result, None
        if shared is not None:
            key, value = shared.joined(key, value)
        expected, _ = self._kernel(module, query, key, value, attention_mask, scaling=scaling, **rest)
        if result is not None:
            difference = (result - expected).float().norm() / expected.float().norm()
            self._agrees[module] = float(difference) <= tolerance(query.dtype)
        return expected, None

    def _added(self, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        """Return the mask's additive term (B * G, L, 1) in the query's dtype."""
        if mask is None:
            return None
        if self._mask is None or self._mask[0] is not mask:
            added = mask
            if mask.dtype == torch.bool:
                lowest = torch.finfo(query.dtype).min
                added = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
            rows_BL = added[:, 0, 0].expand(len(query), -1)
            self._mask = mask, rows_BL.repeat_interleave(key.shape[1], 0)[..., None]
        return self._mask[1]


def attend(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale q kᵀ + added) v for one query per row.

    It multiplies keys by queries, not queries by keys, because the product is faster with the long side first.

    Args:
        query: (B, H, 1, D).
        key: (B, G, L, D); G divides H, and each head serves H / G neighbouring query heads; value likewise.
        added: (B * G, L, 1), or None.

    Returns:
        (B, 1, H, D of the values).
    """
    rows, heads = query.shape[0], query.shape[1]
    groups, length = key.shape[1], key.shape[2]
    query_XDN = query.reshape(rows * groups, heads // groups, -1).transpose(1, 2)
    key_XLD = key.reshape(rows * groups, length, -1)
    if added is None:
        scores_XLN = torch.baddbmm(query.new_empty(1), key_XLD, query_XDN, beta=0, alpha=scale)
    else:
        scores_XLN = torch.baddbmm(added, key_XLD, query_XDN, alpha=scale)
    weights_XNL = scores_XLN.transpose(1, 2).softmax(-1)
    return (weights_XNL @ value.reshape(rows * groups, length, -1)).view(rows, 1, heads, -1)


def fast_decoding(device: torch.device, cache: Cache | None = None) -> AbstractContextManager[None]:
    """Use this attention in models that attend through transformers' interface, where it is faster: on a CPU.

    Args:
        cache: the cache of the models inside the block.
    """
    if device.type != "cpu":
        return nullcontext()
    kernel = ALL_ATTENTION_FUNCTIONS[KERNEL]
    return using(_OneToken(kernel, cache if isinstance(cache, SharedPromptsCache) else None))
