"""Counts of floating-point operations, and of the useful ones among them.

They are counted operator by operator with torch's own formulas (a multiply and an add are two; only matrix
products, convolutions and attention count). Operations are useful if they are spent on real tokens for the first
time, not on padding or on recomputation under checkpointing.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from perl.measure.probe import Listener
from perl.private.torch import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    FLASH_ATTENTION,
    FLASH_ATTENTION_BACKWARD,
    HAS_PACKED_LINEAR,
    PACKED_LINEAR,
    Observer,
    operator_of,
)


def _packed_linear(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


_ATEN = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    # Torch's registry lacks in-place products and the CPU's attention.
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    CPU_ATTENTION: flop_registry[FLASH_ATTENTION],
    CPU_ATTENTION_BACKWARD: flop_registry[FLASH_ATTENTION_BACKWARD],
}
if HAS_PACKED_LINEAR:
    FORMULAS[PACKED_LINEAR] = _packed_linear


class Flops(Observer, Listener):  # type: ignore[no-untyped-call]
    """Counts operations while active.

    Args:
        trunks: modules called with ids or embeddings and `attention_mask`, whose share of real tokens applies
            until the next call.
    """

    def __init__(self, trunks: Iterable[nn.Module]) -> None:
        super().__init__()
        self._trunks = list(trunks)
        self._real_share, self._recomputing = 1.0, 0
        self.total = self.useful = 0.0

    def recomputing(self, begins: bool) -> None:
        """Note whether the following operations are recomputation."""
        self._recomputing += 1 if begins else -1

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block."""
        with contextlib.ExitStack() as hooks:
            for trunk in self._trunks:
                hooks.callback(trunk.register_forward_pre_hook(self._read_real_share, with_kwargs=True).remove)
            with self:
                yield

    def _read_real_share(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        given, mask = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")), kwargs.get("attention_mask")
        length = next((one.shape[1] for one in given if one is not None), 1)
        if mask is None or length == 1:  # one token per row, none of which is padding
            self._real_share = 1.0
        else:
            self._real_share = float(mask[:, -length:].float().mean())

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Count the operator."""
        if formula := FORMULAS.get(operator_of(func)):
            count = formula(*args, **kwargs, out_val=result)
            self.total += count
            self.useful += 0.0 if self._recomputing else count * self._real_share
