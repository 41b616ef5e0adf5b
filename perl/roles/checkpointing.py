"""Activation checkpointing: only each block's input is kept for the backward pass, the rest is recomputed.

A block is recomputed as the role, and with the attention, of the first computation, whichever is active by then.
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
    """Make these blocks keep only their inputs when gradients are computed.

    Args:
        active_role: returns a function that activates the role that is active now.
        check_shapes: whether recomputed tensors must have their original shapes.
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
    """Run a block's forward. A block's hooks, such as those that gather sharded weights, are not checkpointed."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(partial(forward, **named), *inputs, **settings)


@contextlib.contextmanager
def _recomputation(
    enter_role: EnterRole, enter_attention: Callable[[], contextlib.AbstractContextManager[object]]
) -> Iterator[None]:
    with enter_role(), enter_attention(), recomputing():
        yield
