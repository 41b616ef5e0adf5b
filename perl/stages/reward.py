"""The reward stage: trains the `reward` adapter and its head on thumbs, pairs or both with transformers' Trainer.

The members of an ensemble are trained one after another.

TRL's RewardTrainer needs a separate sequence classifier and has no loss for thumbs, so this trainer scores rows
with the reward role. The loss on pairs is TRL's, including margins (a test compares them), plus soft labels.
"""

import statistics
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from perl.measure.cost import costs_in_turn
from perl.results import Recorded, RewardStage, Stage
from perl.rl.rewards.model import score_rows
from perl.roles.role import Role
from perl.roles.split_layers import LowerLayerCache
from perl.stages.cut_rows import say_cut, say_notes
from perl.stages.reward_card import evaluate_rows, print_card
from perl.stages.reward_loss import Collator, Example, batch_loss, loss_at_best_temperature
from perl.stages.reward_rows import (
    Rows,
    bootstrapped,
    held_out_rows,
    training_examples,
    training_rows,
)
from perl.stages.reward_scores import run_scores, scores_are_log_odds
from perl.stages.reward_tfidf import fit_tfidf
from perl.stages.session import Session
from perl.stages.training import SHARE, ResumableTrainer
from perl.stages.training_run import loss_validation, optimizer_steps, training_run
from perl.stages.validation_rows import validation_split
from perl.system.seeds import derived_seed, seed_everything

RECORDED_ROWS = 8
"""Held-out rows whose scores are recorded, so that RL can check that it computes the same scores."""
VALIDATION_BATCH_SIZE = 32
"""Validation examples per forward pass."""
SCALE_ROWS = 512
"""Training rows whose scores give the mean and standard deviation that RL normalises with."""


def check(session: Session) -> None:
    """Refuse data that the reward stage cannot use."""
    training_rows(session)
    _train_and_validation_rows(session)
    held_out_rows(session)


def train_reward(session: Session) -> RewardStage:
    """Train and save all members of the reward model, and compute its card."""
    settings, members = session.recipe.reward, session.reward_members
    assert settings is not None
    everything, held_out = training_rows(session), held_out_rows(session)
    train, validation = _train_and_validation_rows(session)
    rows, cut = len(everything.tokens) + len(held_out.tokens), everything.cut + held_out.cut
    say_cut(cut, rows, session.max_length("reward"), "reward.max_length")
    with tempfile.TemporaryDirectory() as scratch:
        reused = settings.epochs > 1 or len(members) > 1
        lower_layers = lower_layer_cache(session, train, Path(scratch)) if reused else None
        stages, blends = [], []
        for role in members:
            stages.append(_train_member(session, role, train, validation, lower_layers))
            if settings.tfidf and validation is not None:
                blends.append(fit_tfidf(session, role, train, validation, everything))
            session.save(role, **_scale(session, role, train))
    stage, *others = stages
    if others:
        parameters = sum(one.trainable_parameters for one in stages)
        kept = [one for trained in stages for one in trained.kept or ()] or None
        stage = replace(stage, **vars(costs_in_turn(stages)), trainable_parameters=parameters, kept=kept)
    chosen = range(0, len(held_out.tokens), -(-len(held_out.tokens) // RECORDED_ROWS))
    recorded = recorded_scores(session, held_out, chosen)
    session.answer_tokens.clear()
    session.roles.eval()
    return RewardStage(
        **vars(replace(stage, rows=rows, rows_cut=cut)),
        kept_below_bytes=lower_layers.bytes if lower_layers is not None else None,
        blends=blends or None,
        recorded=recorded,
        eval=evaluate_rows(session, held_out.tokens, held_out, everything),
    )


def _train_and_validation_rows(session: Session) -> tuple[Rows, Rows | None]:
    """Return the rows to train on, and the rows to validate on if the recipe has validation."""
    if "likelihood" in session.roles.asked_score_terms:
        session.roles.backbone.require("likelihood", "reward.likelihood")
    train, validation = validation_split(session, "reward")
    return training_rows(session, train), None if validation is None else training_rows(session, validation)


def _train_member(
    session: Session, role: Role, train: Rows, validation: Rows | None, lower_layers: LowerLayerCache | None
) -> Stage:
    """Train one member, or resume its training; return what it cost."""
    seed_everything(_seed(session, role))
    trained = session.add_trained(role, head=True)
    with reward_trainer(session, role, train, validation) as trainer:
        trainer.lower_layers = lower_layers
        trainer.resume()
    stage = session.stage(trainer.run.meter, trained, trainer.run.learning_rate, kept=trainer.kept)
    session.roles.eval()
    return stage


def lower_layer_cache(session: Session, train: Rows, scratch: Path) -> LowerLayerCache | None:
    """Return a cache of the blocks below the adapters for all epochs and members; None without such blocks."""
    roles = session.roles
    return LowerLayerCache(roles, train.ids, session.base.chat.pad_id, scratch) if roles.shared_blocks else None


def _seed(session: Session, role: Role) -> int:
    """Return the seed of a member's adapter, dropout and row order; the first member has the run's seed."""
    number, seed = session.reward_members.index(role), session.recipe.seed
    return derived_seed(seed, "member", number) % 2**32 if number else seed


@contextmanager
def reward_trainer(
    session: Session, role: Role, train: Rows, validation: Rows | None = None, steps: int | None = None
) -> Iterator["RewardTrainer"]:
    """Yield a trainer for a member of the reward model, which `Session.add_trained` has added.

    Args:
        steps: total optimizer steps; by default those of the recipe's epochs.
    """
    from datasets import Dataset  # RL with another reward does not need it

    settings, seed = session.recipe.reward, _seed(session, role)
    assert settings is not None
    examples = training_examples(train, settings.loss)
    if settings.bootstrap:
        examples = bootstrapped(examples, train.dialogues, seed)
    steps = optimizer_steps(len(examples), settings) if steps is None else steps
    held_back = [] if validation is None else training_examples(validation, settings.loss)
    by = "loss at the best temperature"
    chosen = loss_validation(settings, len(held_back), by) if held_back else None
    with training_run(session, role, seed, steps, chosen) as run:
        trainer = RewardTrainer(
            run,
            model=session.roles,
            args=TrainingArguments(**run.arguments(settings)),
            train_dataset=Dataset.from_list([dict(example) for example in examples]),
            data_collator=Collator(session.base.chat.pad_id),
        )
        trainer.validation_examples = held_back
        yield trainer


class RewardTrainer(ResumableTrainer):
    """transformers' Trainer for a member of the reward model."""

    lower_layers: LowerLayerCache | None = None
    validation_examples: Sequence[Example] = ()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss of the validation examples, without dropout, at the scores' best temperature.

        A model becomes overconfident long before its ranking gets worse. The temperature corrects that after
        training, so overconfidence must not decide which weights are kept.
        """
        role, roles, batches = self.run.learner, self.run.session.roles, []
        roles.eval()
        for start in range(0, len(self.validation_examples), VALIDATION_BATCH_SIZE):
            examples = self.validation_examples[start : start + VALIDATION_BATCH_SIZE]
            batch = {name: tensor.to(roles.device) for name, tensor in self.data_collator(examples).items()}
            outputs = roles(role, batch["ids_BL"], batch["mask_BL"], head=role, answers_BL=batch["answers_BL"])
            batches.append((outputs.scores_B.cpu(), {name: tensor.cpu() for name, tensor in batch.items()}))
        return loss_at_best_temperature(batches)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of a batch's examples; with several processes, this process's share of the sum."""
        ids_BL, mask_BL, lower_BLD = inputs["ids_BL"], inputs["mask_BL"], None
        self.run.meter.count(int(mask_BL.sum()))
        if self.lower_layers is not None:
            lower_BLD = self.lower_layers.read(inputs["numbers_B"].tolist(), mask_BL)
        role = self.run.learner
        answers_BL = inputs["answers_BL"]
        outputs = model(role, ids_BL, mask_BL, head=role, lower_hidden_BLD=lower_BLD, answers_BL=answers_BL)
        loss = batch_loss(outputs.scores_B, inputs)
        return loss if self.run.processes.count == 1 else loss * inputs[SHARE]


def _scale(session: Session, role: Role, rows: Rows) -> dict[str, Any]:
    """Return mean and standard deviation of a member's rewards on evenly spaced training rows, for the stamp."""
    chosen, probability = rows.tokens[:: max(1, len(rows.tokens) // SCALE_ROWS)], scores_are_log_odds(session)
    scores_N = score_rows(session.roles, [role], chosen, session.base.chat.pad_id)[0]
    rewards = (scores_N.sigmoid() if probability else scores_N).tolist()
    return {
        "reward_is_probability": probability,
        "reward_mean": statistics.fmean(rewards),
        "reward_std": max(statistics.pstdev(rewards), 1e-3),
    }


def checksum(ids: list[int]) -> int:
    """Return the CRC-32 of a row's tokens."""
    return zlib.crc32(str(ids).encode())


def recorded_scores(session: Session, rows: Rows, chosen: Sequence[int]) -> list[Recorded]:
    """Return the reward model's scores of these rows, computed as one batch to be reproducible bit by bit."""
    scores = run_scores(session, [rows.tokens[index] for index in chosen], RECORDED_ROWS)
    return [
        Recorded(row=index, score=float(score), tokens=checksum(rows.tokens[index].ids))
        for index, score in zip(chosen, scores, strict=True)
    ]


def summary(stage: RewardStage) -> None:
    """Print the reward model card and the stage's notes."""
    print_card("Reward model", stage.eval)
    say_notes(stage)
