"""What TRL's SFTTrainer does to a model without documenting it: it replaces the forward for good."""

import contextlib
from collections.abc import Iterator

from torch import nn
from trl.trainer import sft_trainer

from perl.private.checked import need

need(sft_trainer, "add_fused_lm_head")


@contextlib.contextmanager
def forward_restored(model: nn.Module) -> Iterator[None]:
    """Inside, an SFTTrainer may put its forward with a fused head on the model; afterwards it is gone."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before
