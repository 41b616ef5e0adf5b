"""SFT: the `sft` adapter learns the demonstrations, with TRL's SFTTrainer; the loss falls on agent turns only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from perl.backbones.four_bit import hide_quantization
from perl.data.records import Demonstration
from perl.errors import UserError
from perl.measure.change import loss_words
from perl.results import SftEval, SftStage, Tried
from perl.roles.roles import Role, Roles
from perl.stages.cut_rows import say_cut
from perl.stages.session import Session
from perl.stages.training import SHARE, ResumableTrainer, Watch, training_run
from perl.system.progress import console


def check(session: Session) -> None:
    """Refuse what SFT cannot use, before anything is trained or written."""
    tokenized(session, session.train.demonstrations)
    tokenized(session, session.held_out.demonstrations)


def train_sft(session: Session) -> SftStage | Tried:
    """Train the `sft` adapter and write it; return the stage's result."""
    settings, roles = session.recipe.sft, session.roles
    assert settings is not None
    train = tokenized(session, session.train.demonstrations)
    held_out = tokenized(session, session.held_out.demonstrations)
    cut = sum(train["cut"]) + sum(held_out["cut"])
    _say(session, len(train) + len(held_out), cut)
    train, held_out = train.remove_columns("cut"), held_out.remove_columns("cut")
    roles.add(Role.SFT)
    roles.keep(Role.SFT)
    trained = roles.train_only(Role.SFT)
    steps = -(-len(train) // settings.batch_size) * settings.epochs
    with training_run(session, "sft", steps) as here, _lent(roles) as model:
        trainer = _Trainer(
            model=model,
            args=SFTConfig(
                output_dir=str(here.scratch),
                per_device_eval_batch_size=settings.batch_size,
                max_length=None,
                gradient_checkpointing=False,  # the roles do their own
                pad_to_multiple_of=16,
                dataset_kwargs={"skip_prepare_dataset": True},
                **session.trainer_settings(settings, steps),
            ),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=session.base.tokenizer,
            callbacks=[Watch(here)],
        )
        trainer.run = here
        trainer.remove_callback(PrinterCallback)
        losses = [] if session.trial else [float(trainer.evaluate()["eval_loss"])]
        trainer.resume()
        losses += [] if session.trial else [float(trainer.evaluate()["eval_loss"])]
    stage = session.stage(here.meter, trained, len(train) + len(held_out), cut)
    if session.trial is not None:
        return Tried(**vars(stage), step_seconds=here.meter.step_seconds)
    session.save(Role.SFT)
    return SftStage(**vars(stage), eval=SftEval(n=len(held_out), loss_before=losses[0], loss_after=losses[1]))


class _Trainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer, its tokens counted; its loss is over the tokens of all processes."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        share = inputs.pop(SHARE, None)
        if model.training:
            self.run.meter.count(int(inputs["attention_mask"].sum()))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if share is None or share > 0 else loss * 0.0

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        items, processes = super()._get_num_items_in_batch(batch_samples, device), self.run.processes
        if processes.count == 1 or not batch_samples:
            return items
        (batch,) = batch_samples  # gradients are not accumulated
        return torch.tensor(processes.all_reduce_sum(int(items) if batch[SHARE] > 0 else 0), device=device)


def tokenized(session: Session, demonstrations: list[Demonstration]) -> Dataset:
    """Demonstrations as `input_ids` and `labels`; -100 stands where the agent does not speak.

    A demonstration is one row, or one an answer where the chat template writes earlier answers otherwise
    (`ChatFormat.rows`); `cut` says which were too long.

    Raises:
        UserError: after cutting to `sft.max_length`, no agent turn is left in any of them.
    """
    assert session.recipe.sft is not None
    length, chat, rows = _length(session), session.base.chat, []
    for tokens in (row for record in demonstrations for row in chat.rows(record.context, record.answer, length)):
        if any(tokens.spoken):
            labels = [token if spoken else -100 for token, spoken in zip(tokens.ids, tokens.spoken, strict=True)]
            rows.append({"input_ids": tokens.ids, "labels": labels, "length": len(tokens.ids), "cut": tokens.cut})
    if not rows:
        raise UserError(
            f"no demonstration has an agent turn within {length} tokens",
            where="sft.max_length",
            remedy="Raise it, or check the data with `perl-rlhf data check`.",
        )
    return Dataset.from_list(rows)


def _length(session: Session) -> int:
    assert session.recipe.sft is not None
    return min(session.recipe.sft.max_length, session.base.context_length)


def _say(session: Session, rows: int, cut: int) -> None:
    """Say what became of the demonstrations as rows."""
    if session.trial is not None:
        return
    demonstrations = len(session.train.demonstrations) + len(session.held_out.demonstrations)
    if rows > demonstrations:
        console.print(
            f"{demonstrations} demonstrations are {rows} rows: the chat template writes earlier answers otherwise "
            "than the last one, so each answer is learned in a row of its own, as it is asked for."
        )
    say_cut(cut, rows, _length(session), "sft.max_length")


@contextmanager
def _lent(roles: Roles) -> Iterator[PreTrainedModel]:
    """The SFT role's model, for the Trainer to train: whether it is training is decided by `Roles.train`.

    SFTTrainer puts a forward of its own on it and leaves it; the base is others' too.
    """

    def train(mode: bool = True) -> PreTrainedModel:
        del vars(model)["train"]  # which the roles would call
        roles.train(mode)
        vars(model)["train"] = train
        model.training = mode  # no more than what the Trainer reads: the modules in it stay in eval mode
        return model

    with roles.role(Role.SFT), hide_quantization(model := roles.model()):
        had = vars(model).get("forward")
        vars(model)["train"] = train
        try:
            yield model
        finally:
            del vars(model)["train"]
            roles.eval()
            if had is None:
                vars(model).pop("forward", None)
            else:
                model.forward = had


def summary(stage: SftStage) -> None:
    """Say in words what SFT came to."""
    console.print(
        f"[bold]SFT[/]: the loss on {stage.eval.n} held-out demonstrations "
        f"{loss_words(stage.eval.loss_before, stage.eval.loss_after)}; "
        f"{stage.trainable_parameters:,} trainable parameters."
    )
