"""SFT of an encoder-decoder with transformers' Trainer: the encoder reads contexts, the decoder has the loss.

The loss is transformers' loss with `labels`: the mean of -log p over the completions' tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from perl.backbones.padding import joined
from perl.measure.paired import TokenLosses
from perl.recipe import Supervised
from perl.roles.role import Role
from perl.stages.training import SHARE, ResumableTrainer
from perl.stages.training_run import TrainingRun


@dataclass(frozen=True)
class _Collator:
    """Collates rows with labels: contexts padded on the left, completions on the right."""

    pad_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [(example["input_ids"], example["labels"].count(-100)) for example in examples]
        prompts, completions = [ids[:begin] for ids, begin in rows], [ids[begin:] for ids, begin in rows]
        ids_BL, mask_BL = joined(prompts, completions, self.pad_id, torch.device("cpu"))
        return {"ids_BL": ids_BL, "mask_BL": mask_BL, "length": torch.tensor(max(map(len, completions)))}


class EncoderDecoderTrainer(ResumableTrainer):
    """Trainer of the `sft` role.

    Args:
        train, validation: rows with `input_ids` and `labels`, which are -100 in the context.
    """

    def __init__(
        self,
        run: TrainingRun,
        settings: Supervised,
        train: Dataset,
        validation: Dataset | None,
    ) -> None:
        super().__init__(
            run,
            model=run.session.roles,
            args=TrainingArguments(**run.arguments(settings)),
            train_dataset=train,
            data_collator=_Collator(run.session.base.chat.pad_id),
        )
        self._batch_size, self._validation = settings.batch_size, validation

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss per token of a batch; with several processes, this process's share of the sum."""
        self.run.meter.count(int(inputs["mask_BL"].sum()))
        log_probs_BT, mask_BT = self._log_probs(model, inputs)
        tokens = int(mask_BT.sum())
        share, processes = inputs.get(SHARE), self.run.processes
        counts = share is None or bool(share > 0)
        total = processes.all_reduce_sum(tokens if counts else 0) if processes.count > 1 else tokens
        loss = -log_probs_BT.sum() / max(1, total)
        return loss if counts else loss * 0.0

    def _log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the log-probs (B, T) of a batch's completions, and the mask (B, T) of their tokens."""
        ids_BL, mask_BL, length = inputs["ids_BL"], inputs["mask_BL"], int(inputs["length"])
        outputs = model(Role.SFT, ids_BL, mask_BL, completion_length=length, temperature=1.0)
        return outputs.log_probs_BT, mask_BL[:, -length:]

    def validation_loss(self) -> float:
        """Return the mean loss per token of the validation completions."""
        assert self._validation is not None
        return self.losses(self._validation).mean

    @torch.no_grad()
    def losses(self, dataset: Dataset) -> TokenLosses:
        """Return the losses of rows in the format of `train`, in their order."""
        roles, rows = self.run.session.roles.eval(), list(dataset)
        sums, tokens = list[float](), list[int]()
        for start in range(0, len(rows), self._batch_size):
            batch = self.data_collator(rows[start : start + self._batch_size])
            batch = {name: tensor.to(roles.device) for name, tensor in batch.items()}
            log_probs_BT, mask_BT = self._log_probs(roles, batch)
            sums += (-log_probs_BT.sum(1)).tolist()
            tokens += mask_BT.sum(1).tolist()
        return TokenLosses(sums, tokens)
