"""Activation checkpointing: each block's input is kept for the backward pass, and the rest computed again.

A block is computed again as the role that it was first computed as, whichever is active by then.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perl.measure.probe import recomputing

EnterRole = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def checkpointed(
    blocks: Sequence[nn.Module], active_role: Callable[[], EnterRole], *, check_shapes: bool
) -> Iterator[None]:
    """Inside, these blocks keep only their inputs where gradients are computed.

    Args:
        active_role: gives a function that enters the role which is active when it is called.
        check_shapes: whether what a block computes again must have the shapes that it had first.
    """

    def contexts() -> tuple[Any, Any]:
        """When a block is first computed, and when again."""
        return contextlib.nullcontext(), _again(active_role())

    settings = {
        "use_reentrant": False,
        "context_fn": contexts,
        "determinism_check": "default" if check_shapes else "none",
    }
    own = [vars(block).get("forward") for block in blocks]  # a library may have put one of its own there
    for block in blocks:
        block.forward = partial(_forward, block.forward, settings)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _forward(forward: Callable[..., Any], settings: dict[str, Any], *inputs: Any, **named: Any) -> Any:
    """A block's forward. Hooks of a block, such as those that gather sharded weights, stay outside."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(partial(forward, **named), *inputs, **settings)


@contextlib.contextmanager
def _again(enter_role: EnterRole) -> Iterator[None]:
    with enter_role(), recomputing():
        yield
