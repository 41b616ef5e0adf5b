"""Activation checkpointing: only each block's input is kept for the backward pass, the rest is computed again.

A block is computed again as the role that first computed it, and with the attention, whichever is active by then.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perl.backbones.shared_prompts import attention_as_now
from perl.measure.probe import recomputing

EnterRole = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def checkpointed(
    blocks: Sequence[nn.Module], active_role: Callable[[], EnterRole], *, check_shapes: bool
) -> Iterator[None]:
    """Inside, these blocks keep only their inputs where gradients are computed.

    Args:
        active_role: returns a function that enters the role which is active now.
        check_shapes: whether recomputed tensors must have the shapes that they had first.
    """
    settings = {
        "use_reentrant": False,
        "context_fn": lambda: (contextlib.nullcontext(), _recomputation(active_role(), attention_as_now())),
        "determinism_check": "default" if check_shapes else "none",
    }
    before = [vars(block).get("forward") for block in blocks]  # a library may have set one
    for block in blocks:
        block.forward = partial(_forward, block.forward, settings)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _forward(forward: Callable[..., Any], settings: dict[str, Any], *inputs: Any, **named: Any) -> Any:
    """A block's forward. Hooks of a block, such as those that gather sharded weights, stay outside."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(partial(forward, **named), *inputs, **settings)


@contextlib.contextmanager
def _recomputation(
    enter_role: EnterRole, enter_attention: Callable[[], contextlib.AbstractContextManager[object]]
) -> Iterator[None]:
    with enter_role(), enter_attention(), recomputing():
        yield
