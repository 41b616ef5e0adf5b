"""Shared-prefix attention: several completions of a prompt in one pass that computes the prompt only once.

A batch of B rows with G distinct prompts becomes one row of N = G · P + B · T positions: the prompts, then the
completions. Everything except attention works on each position separately and is unaffected. Attention is computed
in two parts: prompts attend to themselves, and each completion to its prompt and to itself, all with the positions
that they have in their rows. So outputs and gradients equal those of the plain pass up to rounding.

It requires that every block of the trunk uses transformers' `sdpa` attention; `unsupported_reason` tests this.

Axis letters, in addition to those of `perl.roles`: G distinct prompts, H heads, S head size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perl.backbones.backbone import Backbone
from perl.backbones.padding import left_pad
from perl.errors import UserError
from perl.system.device import to_device

KERNEL = "sdpa"
"""transformers' name for the attention function that computes each part."""


@dataclass(frozen=True)
class SharedPrompts:
    """Which rows of a batch share a prompt."""

    first_G: list[int]
    """For each distinct prompt, the index of a row with it."""
    prompt_B: list[int]
    """Each row's prompt, as an index into `first_G`."""
    completion_length: int
    """T, the number of rightmost columns; those before are the prompt, and equal in rows that share it."""

    @classmethod
    def of(cls, groups: Sequence[int], completion_length: int) -> "SharedPrompts | None":
        """Group rows by number: equal numbers mean the same prompt. Return None if no two rows share one."""
        places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
        if len(places) == len(groups):
            return None
        first = [groups.index(group) for group in places]
        return cls(first, [places[group] for group in groups], completion_length)


class Layout:
    """The mapping from a batch's positions to the single row, and their attention masks.

    Args:
        mask_BL: True for real tokens, bool; prompts padded on the left, completions on the right.
        dtype: of the queries.
    """

    def __init__(self, prompts: SharedPrompts, mask_BL: Tensor, dtype: torch.dtype) -> None:
        device, (rows, columns) = mask_BL.device, mask_BL.shape
        length = columns - prompts.completion_length
        self._shapes = (len(prompts.first_G), length), (rows, prompts.completion_length)
        self.prompt_B = to_device(prompts.prompt_B, device)
        first_G = to_device(prompts.first_G, device)
        batch_BL = torch.arange(rows * columns, device=device).view(rows, columns)
        self._in_batch_N = torch.cat([batch_BL[first_G, :length].flatten(), batch_BL[:, length:].flatten()])
        places_N = torch.arange(len(self._in_batch_N), device=device)
        places_GP, places_BT = self._parts(places_N, 0)
        self._in_row_BL = torch.cat([places_GP[self.prompt_B], places_BT], 1)
        self.mask_1N = self.pack(mask_BL)
        self.prompt_mask_G1PP = _additive_mask(mask_BL[first_G, :length], length, dtype)
        self.completion_mask_B1TL = _additive_mask(mask_BL, prompts.completion_length, dtype)

    def _parts(self, of_N: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Split the axis of all positions into (G, P) and (B, T)."""
        (prompts, length), own = self._shapes
        shared, rest = of_N.tensor_split([prompts * length], axis)
        return torch.unflatten(shared, axis, (prompts, length)), torch.unflatten(rest, axis, own)

    def pack(self, of_BL: Tensor) -> Tensor:
        """Convert (B, L, …) to (1, N, …)."""
        return of_BL.flatten(0, 1)[self._in_batch_N][None]

    def unpack(self, of_1N: Tensor) -> Tensor:
        """Convert (1, N, …) to (B, L, …)."""
        return of_1N[0][self._in_row_BL]

    def heads(self, of_1HNS: Tensor) -> tuple[Tensor, Tensor]:
        """Split (1, H, N, S) into the prompts (G, H, P, S) and the completions (B, H, T, S)."""
        shared_HGPS, own_HBTS = self._parts(of_1HNS[0], 1)
        return shared_HGPS.transpose(0, 1), own_HBTS.transpose(0, 1)


def _additive_mask(mask_BL: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, 1, queries, L) for the last positions: 0, or the lowest number where masked.

    Each position attends to itself, even padding: a softmax over nothing would be NaN.
    """
    length = mask_BL.shape[1]
    offset = length - queries
    earlier_QL = torch.ones(queries, length, dtype=torch.bool, device=mask_BL.device).tril(offset - 1)
    attends_BQL = mask_BL[:, None] & earlier_QL
    attends_BQL.diagonal(offset, 1, 2).fill_(True)
    zeros_BQL = torch.zeros(attends_BQL.shape, dtype=dtype, device=mask_BL.device)
    return zeros_BQL.masked_fill_(~attends_BQL, torch.finfo(dtype).min)[:, None]


class _ShortWindowError(Exception):
    """A layer attends to fewer tokens than the rows have."""


class _ByParts:
    """Replacement for transformers' attention function, for all positions of a layout."""

    def __init__(self, kernel: Callable[..., Any], layout: Layout) -> None:
        self._kernel, self.layout = kernel, layout
        self.attended: set[nn.Module] = set()

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
    ) -> tuple[Tensor, None]:
        """Attend as in transformers: query, key and value (1, H, N, S) to (1, N, H, S), with the layout's masks.

        Raises:
            _ShortWindowError: the layer's sliding window is shorter than the rows.
        """
        layout = self.layout
        if (window := rest.get("sliding_window")) and window < layout.completion_mask_B1TL.shape[3]:
            raise _ShortWindowError(f"its layers attend to the last {window} tokens only")
        self.attended.add(module)
        shared, own = zip(*(layout.heads(one) for one in (query, key, value)), strict=True)
        # Of each completion with its prompt, (B, H, L, S).
        keys, values = (torch.cat([shared[which][layout.prompt_B], own[which]], 2) for which in (1, 2))
        of_prompts_GPHS, _ = self._kernel(module, *shared, layout.prompt_mask_G1PP, **rest)
        of_completions_BTHS, _ = self._kernel(module, own[0], keys, values, layout.completion_mask_B1TL, **rest)
        both = of_prompts_GPHS.flatten(0, 1), of_completions_BTHS.flatten(0, 1)
        return torch.cat(both)[None], None


@contextlib.contextmanager
def using(attention: Callable[..., Any]) -> Iterator[None]:
    """Replace transformers' attention function inside the context."""
    kernel = ALL_ATTENTION_FUNCTIONS[KERNEL]
    ALL_ATTENTION_FUNCTIONS[KERNEL] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[KERNEL] = kernel


@contextlib.contextmanager
def attending(layout: Layout | None) -> Iterator[set[nn.Module]]:
    """Use the layout's attention inside the context, if there is one; yield the modules that have used it."""
    if layout is None:
        yield set()
        return
    by_parts = _ByParts(ALL_ATTENTION_FUNCTIONS[KERNEL], layout)
    with using(by_parts):
        yield by_parts.attended


def attention_as_now() -> Callable[[], AbstractContextManager[object]]:
    """Return a function that activates the attention that is active now, for later recomputation."""
    function = ALL_ATTENTION_FUNCTIONS[KERNEL]
    return partial(attending, function.layout if isinstance(function, _ByParts) else None)


@contextlib.contextmanager
def sharing(lm: PreTrainedModel, prompts: SharedPrompts | None, mask_BL: Tensor) -> Iterator[set[nn.Module]]:
    """Make the trunk compute each of these prompts only once; its inputs and outputs remain (B, L, …).

    Yields the modules that have used shared attention; with None nothing changes.
    """
    if prompts is None:
        yield set()
        return
    layout, trunk = Layout(prompts, mask_BL, lm.dtype), lm.base_model

    def pack(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        packed = {
            name: layout.pack(named[name])
            for name in ("input_ids", "inputs_embeds", "position_ids")
            if named.get(name) is not None
        }
        # A mask with four axes passes unchanged through the model to the attention, which uses the layout's.
        return inputs, named | packed | {"attention_mask": layout.mask_1N[None, None]}

    def unpack(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        output.last_hidden_state = layout.unpack(output.last_hidden_state)

    with (
        trunk.register_forward_pre_hook(pack, with_kwargs=True, prepend=True),
        trunk.register_forward_hook(unpack),
        attending(layout) as inside,
    ):
        yield inside


@torch.no_grad()
def unsupported_reason(
    backbone: Backbone, lm: PreTrainedModel, prompt: Sequence[int], completion_length: int
) -> str | None:
    """Return why this model cannot share prompts; None if it can, as tested on a padded batch.

    Args:
        prompt: the longest prompt.
        completion_length: the maximum length of completions.
    """
    name = type(lm).__name__
    both = [list(prompt), list(prompt[: len(prompt) // 2 + 1])]
    ids_GP, mask_GP = left_pad(both, 0, lm.device)
    lengths_B1 = torch.tensor([[completion_length], [completion_length // 2 + 1]] * 2, device=lm.device)
    mask_BT = torch.arange(completion_length, device=lm.device) < lengths_B1
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    ids_BT = torch.arange(mask_BT.numel(), device=lm.device).view(mask_BT.shape) % vocabulary
    ids_BL, mask_BL = (
        torch.cat([prompts.repeat_interleave(2, 0), own], 1)
        for prompts, own in ((ids_GP, ids_BT), (mask_GP, mask_BT))
    )
    plain_BLD = backbone.hidden(lm, ids_BL, mask_BL)
    try:
        with sharing(lm, SharedPrompts.of([0, 0, 1, 1], completion_length), mask_BL) as attended:
            shared_BLD = backbone.hidden(lm, ids_BL, mask_BL)
    except _ShortWindowError as error:
        return f"{name} cannot compute several completions in one row: {error}"
    except (UserError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return f"{name} does not accept the attention mask and positions that several completions in one row need"
    if len(attended) != len(backbone.blocks(lm)):
        return f"{name} does not use transformers' {KERNEL} attention in every block"
    at_N = mask_BL.nonzero(as_tuple=True)
    plain_ND, shared_ND = plain_BLD[at_N].float(), shared_BLD[at_N].float()
    rounding = 8 * torch.finfo(plain_BLD.dtype).eps
    if not float((shared_ND - plain_ND).norm()) <= rounding * float(plain_ND.norm()):
        return f"{name} gives other results for several completions in one row than for each alone"
    if not _attends_to_cache(backbone, lm):
        return f"{name}'s attention does not use the keys and values exactly as the cache returns them"
    return None


class _RecordingCache(DynamicCache):
    """A cache that records the keys and values that it returned last."""

    last: tuple[Tensor, Tensor]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.last = super().update(*args, **kwargs)
        return self.last


def _attends_to_cache(backbone: Backbone, lm: PreTrainedModel) -> bool:
    """Return whether attention receives the cache's keys and values unchanged.

    Only then does it find the prompts, which the cache stores once. Latent attention (DeepSeek) expands the
    cached values first; differential attention (DiffLlama) rearranges them.
    """
    cache, kernel, cached = _RecordingCache(config=lm.config), ALL_ATTENTION_FUNCTIONS[KERNEL], list[bool]()

    def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **rest: Any) -> Any:
        cached.append(key is cache.last[0] and value is cache.last[1])
        return kernel(module, query, key, value, *args, **rest)

    ids_BN = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    mask_BL = torch.ones_like(ids_BN)
    with using(recording):
        backbone.extend(lm, ids_BN, mask_BL, mask_BL, cache)
    return all(cached)
