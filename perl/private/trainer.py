"""The private methods of transformers' Trainer that checkpoints and several processes need, as public hooks."""

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
    """A Trainer whose order of rows and checkpoints are a subclass's; it writes none of its own."""

    def train_sampler(self, lengths: Sequence[int]) -> Sampler[int]:
        """The order of the training rows, given their lengths in tokens."""
        raise NotImplementedError

    def save_state(self) -> None:
        """Write all state of the training; called after the steps that the arguments say."""
        raise NotImplementedError

    def load_state(self) -> None:
        """Restore weights, optimizer and schedule, which exist by then."""
        raise NotImplementedError

    def load_generators(self) -> None:
        """Restore the random generators; called last before the first step."""
        raise NotImplementedError

    def count_loss_tokens(self, batch: dict[str, Any], tokens: Tensor) -> Tensor:
        """The number that the loss of a batch is divided by; `tokens` has a label in it."""
        return tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return self.train_sampler(rows["length"])

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        items = super()._get_num_items_in_batch(batch_samples, device)
        # Gradients are not accumulated: there is one batch.
        return self.count_loss_tokens(batch_samples[0], items) if items is not None else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights are put back with the optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_state()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.load_generators()
