"""SFT: trains the `sft` adapter on the demonstrations with TRL's SFTTrainer; only agent turns have a loss.

TRL's trainer is for causal LMs; encoder-decoders use `perl.stages.sft_encoder_decoder`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from perl.backbones.four_bit import hide_quantization
from perl.data.records import Demonstration
from perl.errors import UserError
from perl.measure.change import HARDLY, measured_words
from perl.measure.paired import TokenLosses
from perl.private.trl import forward_restored
from perl.results import SftEval, SftStage
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.stages.cut_rows import say_cut, say_notes
from perl.stages.session import Session
from perl.stages.sft_encoder_decoder import EncoderDecoderTrainer
from perl.stages.training import SHARE, ResumableTrainer
from perl.stages.training_run import loss_validation, optimizer_steps, training_run
from perl.stages.validation_rows import validation_split
from perl.system.progress import console, counted

SftRows = tuple[Dataset, Dataset | None, Dataset]
"""Rows to train on, validation rows if any, and held-out rows, as returned by `tokenized`."""
METADATA_COLUMNS = ["cut", "dialogue"]
"""Columns that describe a row and are not part of a batch."""


def check(session: Session) -> None:
    """Refuse data that SFT cannot use; its rows are kept for `train_sft`."""
    session.sft_rows = _session_rows(session)


def train_sft(session: Session) -> SftStage:
    """Train the `sft` role, evaluate it before and after, and save it."""
    train, validation, held_out = session.sft_rows or _session_rows(session)
    session.sft_rows = None
    all_rows = [train, held_out] if validation is None else [train, validation, held_out]
    rows, cut = sum(map(len, all_rows)), sum(sum(one["cut"]) for one in all_rows)
    _say_rows(session, rows, cut)
    trained = session.add_trained(Role.SFT)
    with sft_trainer(session, train, validation) as trainer:
        before = trainer.losses(held_out)
        trainer.resume()
        after = trainer.losses(held_out)
    stage = session.stage(trainer.run.meter, trained, trainer.run.learning_rate, rows, cut, trainer.kept)
    session.save(Role.SFT)
    found = SftEval(
        n=len(held_out),
        loss_before=before.mean,
        loss_after=after.mean,
        loss_interval=before.interval_to(after, held_out["dialogue"]),
    )
    return SftStage(**vars(stage), eval=found)


def _session_rows(session: Session) -> SftRows:
    own, held_back = validation_split(session, "sft")
    train, held_out = (tokenized(session, one.demonstrations) for one in (own, session.held_out))
    return train, None if held_back is None else tokenized(session, held_back.demonstrations), held_out


@contextmanager
def sft_trainer(
    session: Session,
    train: Dataset,
    validation: Dataset | None = None,
    steps: int | None = None,
) -> Iterator["RoleTrainer | EncoderDecoderTrainer"]:
    """Yield a trainer for the `sft` role, which `Session.add_trained` has added.

    Args:
        train, validation: rows as returned by `tokenized`.
        steps: total optimizer steps; by default those of the recipe's epochs.
    """
    settings, seed = session.recipe.sft, session.recipe.seed
    assert settings is not None
    steps = optimizer_steps(len(train), settings) if steps is None else steps
    chosen = None if validation is None else loss_validation(settings, len(validation))
    if session.roles.backbone.encodes_prompts:
        with training_run(session, Role.SFT, seed, steps, chosen) as run:
            yield EncoderDecoderTrainer(run, settings, train, validation)
        return
    with (
        training_run(session, Role.SFT, seed, steps, chosen) as run,
        trainable_model(session.roles, Role.SFT) as model,
    ):
        trainer = RoleTrainer(
            run,
            model=model,
            args=SFTConfig(
                per_device_eval_batch_size=settings.batch_size,
                max_length=None,
                gradient_checkpointing=False,  # the roles implement it
                pad_to_multiple_of=16,
                dataset_kwargs={"skip_prepare_dataset": True},
                **run.arguments(settings),
            ),
            train_dataset=train.remove_columns(METADATA_COLUMNS),
            processing_class=session.base.tokenizer,
        )
        trainer.validation_rows = validation
        yield trainer


class RoleTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer, with the loss normalised by the tokens of all processes."""

    validation_rows: Dataset | None = None

    def validation_loss(self) -> float:
        """Return the mean loss per token of the validation completions."""
        assert self.validation_rows is not None
        return self.losses(self.validation_rows).mean

    @torch.no_grad()
    def losses(self, rows: Dataset) -> TokenLosses:
        """Return the losses of rows from `tokenized`, in their order, computed with TRL's own forward."""
        self.model.eval()
        sums, tokens = [], []
        for batch in self.get_eval_dataloader(rows.remove_columns(METADATA_COLUMNS)):
            outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
            sums.append(-outputs.log_probs.sum(1))
            tokens.append(outputs.label_mask.sum(1))
        return TokenLosses(torch.cat(sums).tolist(), torch.cat(tokens).tolist())

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, or 0 for rows that only fill up a batch."""
        share = inputs.pop(SHARE, None)
        if model.training:
            self.run.meter.count(int(inputs["attention_mask"].sum()))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if share is None or share > 0 else loss * 0.0

    def count_loss_tokens(self, batch: dict[str, Any], tokens: Tensor) -> Tensor:
        """Return the number of tokens with a loss in all processes."""
        processes = self.run.processes
        if processes.count == 1 or SHARE not in batch:
            return tokens
        total = processes.all_reduce_sum(int(tokens) if batch[SHARE] > 0 else 0)
        return torch.tensor(total, device=tokens.device)


def tokenized(session: Session, demonstrations: list[Demonstration]) -> Dataset:
    """Return demonstrations as `input_ids`, `labels` (-100 outside agent turns), `length`, `cut` and `dialogue`.

    A demonstration is one row, or one row per answer if the chat template renders earlier answers differently
    from the last one (`ChatFormat.rows`); `cut` marks rows that were too long.

    Raises:
        UserError: no demonstration has an agent turn left after truncation to `sft.max_length`.
    """
    length, chat, rows = session.max_length("sft"), session.base.chat, []
    for record in demonstrations:
        for tokens in chat.rows(record.context, record.answer, length):
            if any(tokens.spoken):
                spoken = zip(tokens.ids, tokens.spoken, strict=True)
                row = {"input_ids": tokens.ids, "labels": [token if said else -100 for token, said in spoken]}
                about = {"length": len(tokens.ids), "cut": tokens.cut, "dialogue": record.dialogue}
                rows.append(row | about)
    if not rows:
        raise UserError(
            f"no demonstration has an agent turn within {length} tokens",
            where="sft.max_length",
            remedy="Raise it, or check the data with `perl-rlhf data check`.",
        )
    return Dataset.from_list(rows)


def _say_rows(session: Session, rows: int, cut: int) -> None:
    demonstrations = len(session.train.demonstrations) + len(session.held_out.demonstrations)
    if rows > demonstrations:
        console.print(
            f"{counted(demonstrations, 'demonstration')} make {rows} rows: the chat template renders earlier "
            "answers differently from the last one, so each answer is trained on in a row of its own, rendered "
            "as it will be generated."
        )
    say_cut(cut, rows, session.max_length("sft"), "sft.max_length")


@contextmanager
def trainable_model(roles: Roles, role: Role) -> Iterator[PreTrainedModel]:
    """Yield a role's model for one of TRL's trainers; `Roles.train` sets the training mode of its modules."""
    model: PreTrainedModel

    def train(mode: bool = True) -> PreTrainedModel:
        del vars(model)["train"]  # roles.train would call it
        roles.train(mode)
        vars(model)["train"] = train
        model.training = mode  # read by the Trainer; the modules inside stay in eval mode
        return model

    with roles.role(role), hide_quantization(model := roles.model()), forward_restored(model):
        vars(model)["train"] = train
        try:
            yield model
        finally:
            del vars(model)["train"]
            roles.eval()


def summary(stage: SftStage) -> None:
    """Print the result of SFT."""
    found = stage.eval
    ends, little = (found.loss_before, found.loss_after, found.loss_interval), HARDLY * found.loss_before
    told = measured_words(*ends, little=little, rows="rows")
    console.print(
        f"[bold]SFT[/]: the loss on {counted(found.n, 'held-out demonstration')} {told}; "
        f"{stage.trainable_parameters:,} trainable parameters."
    )
    say_notes(stage)
