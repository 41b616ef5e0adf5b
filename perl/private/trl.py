"""Undocumented behavior of TRL's trainers: they permanently replace a model's forward, and tokenize rows."""

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

# Disable telemetry, with which TRL's trainers report their creation to the hub, unless the variable is set.
constants.HF_HUB_DISABLE_TELEMETRY |= "HF_HUB_DISABLE_TELEMETRY" not in os.environ
for module in (sft_trainer, dpo_trainer, kto_trainer):
    need(module, "add_fused_lm_head")
for trainer in (DPOTrainer, KTOTrainer):
    need(trainer, "_prepare_dataset", "_precompute_ref_logps")


@contextlib.contextmanager
def forward_restored(model: nn.Module) -> Iterator[None]:
    """Restore the model's forward afterwards, which TRL's trainers replace with one that has a fused head."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before


class TokenizedKto(KTOTrainer):
    """KTOTrainer on tokenized rows: TRL's own would also end with what a template writes after the end token."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class TokenizedDpo(DPOTrainer):
    """DPOTrainer on tokenized rows, as `TokenizedKto`."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset
