"""The private methods of transformers' Trainer needed for checkpoints and multiple processes, as public hooks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from perl.private.checked import need

__all__ = ["HookedTrainer", "LengthGroupedSampler"]

need(
    Trainer,
    "_get_train_sampler",
    "_get_num_items_in_batch",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
)
need(LengthGroupedSampler.__init__, "batch_size", "lengths", "generator")


class HookedTrainer(Trainer):
    """A Trainer whose subclass defines the order of rows and the checkpoints; it writes none of its own."""

    def train_sampler(self, lengths: Sequence[int]) -> Sampler[int]:
        """Return a sampler of the training rows, given their lengths in tokens."""
        raise NotImplementedError

    def save_state(self) -> None:
        """Write all training state; called at the steps given by the training arguments."""
        raise NotImplementedError

    def load_state(self) -> None:
        """Restore weights, optimizer and schedule, which exist by then."""
        raise NotImplementedError

    def load_generators(self) -> None:
        """Restore the random generators; called last, before the first step."""
        raise NotImplementedError

    def count_loss_tokens(self, batch: dict[str, Any], tokens: Tensor) -> Tensor:
        """Return the divisor of a batch's loss; `tokens` is the number of tokens with a label."""
        return tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return self.train_sampler(rows["length"])

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        items = super()._get_num_items_in_batch(batch_samples, device)
        # There is only one batch, as gradients are not accumulated.
        return self.count_loss_tokens(batch_samples[0], items) if items is not None else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing yet: weights are restored together with the optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_state()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.load_generators()
