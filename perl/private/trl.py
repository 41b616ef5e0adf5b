"""What TRL's trainers do without documenting it: they replace a model's forward for good, and tokenize rows."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from huggingface_hub import constants
from torch import nn
from trl import DPOTrainer, KTOTrainer
from trl.trainer import dpo_trainer, kto_trainer, sft_trainer

from perl.private.checked import need

# TRL's trainers would tell the hub that they were made. Whoever wants that sets the variable to 0.
constants.HF_HUB_DISABLE_TELEMETRY |= "HF_HUB_DISABLE_TELEMETRY" not in os.environ
for module in (sft_trainer, dpo_trainer, kto_trainer):
    need(module, "add_fused_lm_head")
for trainer in (DPOTrainer, KTOTrainer):
    need(trainer, "_prepare_dataset", "_precompute_ref_logps")


@contextlib.contextmanager
def forward_restored(model: nn.Module) -> Iterator[None]:
    """Inside, one of TRL's trainers may put its forward with a fused head on the model; afterwards it is gone."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before


class TokenizedKto(KTOTrainer):
    """Takes rows that are tokenized already: TRL's own end after what a template writes behind the end token."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class TokenizedDpo(DPOTrainer):
    """As `TokenizedKto`."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset
