"""The reward stage: the `reward` adapter and its head learn from thumbs, pairs or both, on transformers' Trainer.

TRL's RewardTrainer needs a sequence classifier of its own and has no loss for thumbs, so this trainer scores rows
with the reward role. The loss on pairs is TRL's, margins included (a test compares them); soft labels are added.
"""

import statistics
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from perl.results import Recorded, RewardStage
from perl.rl.rewards.model import probabilities, score_rows
from perl.roles.lower_layer_cache import LowerLayerCache
from perl.roles.roles import Role, Roles
from perl.stages.cut_rows import say_cut
from perl.stages.reward_card import evaluate_rows, print_card
from perl.stages.reward_loss import Collator, batch_loss
from perl.stages.reward_rows import Rows, held_out_rows, max_length, training_examples, training_rows
from perl.stages.session import Session
from perl.stages.training import SHARE, ResumableTrainer
from perl.stages.training_run import optimizer_steps, training_run

RECORDED = 8
"""Held-out rows whose scores are recorded, for RL to check that they are scored alike."""
SCALE_ROWS = 512
"""Training rows whose scores give the mean and standard deviation that RL normalises by."""


def check(session: Session) -> None:
    training_rows(session)
    held_out_rows(session)


def train_reward(session: Session) -> RewardStage:
    settings, roles, pad_id = session.recipe.reward, session.roles, session.base.chat.pad_id
    assert settings is not None
    train, held_out = training_rows(session), held_out_rows(session)
    rows, cut = len(train.ids) + len(held_out.ids), train.cut + held_out.cut
    say_cut(cut, rows, max_length(session), "reward.max_length")
    trained = session.add_trained(Role.REWARD, head=True)
    with reward_trainer(session, train) as trainer:
        if settings.epochs > 1:
            trainer.cache_lower_layers(train)
        trainer.resume()
    stage = session.stage(trainer.run.meter, trained, rows, cut)
    roles.eval()
    session.save(Role.REWARD, **_scale(roles, train, pad_id, settings.loss != "pairs"))
    chosen = range(0, len(held_out.ids), -(-len(held_out.ids) // RECORDED))
    return RewardStage(
        **vars(stage),
        kept_below_bytes=trainer.lower_layers.bytes if trainer.lower_layers is not None else None,
        recorded=recorded_scores(roles, held_out, pad_id, chosen),
        eval=evaluate_rows(roles, held_out.ids, held_out, train, pad_id),
    )


@contextmanager
def reward_trainer(session: Session, train: Rows, steps: int | None = None) -> Iterator["RewardTrainer"]:
    """A trainer of the `reward` role, after `Session.add_trained`.

    Args:
        steps: optimizer steps in all; by default those of the recipe's epochs.
    """
    settings = session.recipe.reward
    assert settings is not None
    examples = training_examples(train, settings.loss)
    steps = optimizer_steps(len(examples), settings) if steps is None else steps
    with training_run(session, "reward", steps) as run:
        yield RewardTrainer(
            run,
            model=session.roles,
            args=TrainingArguments(**run.arguments(settings)),
            train_dataset=Dataset.from_list(examples),
            data_collator=Collator(session.base.chat.pad_id),
        )


class RewardTrainer(ResumableTrainer):
    """transformers' Trainer on the reward role."""

    lower_layers: LowerLayerCache | None = None

    def cache_lower_layers(self, train: Rows) -> None:
        """Compute the blocks below the adapters once for all epochs, where there are any."""
        roles, pad_id = self.run.session.roles, self.run.session.base.chat.pad_id
        if roles.shared_blocks:
            self.lower_layers = LowerLayerCache(roles, train.ids, pad_id, self.run.scratch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the examples of a batch; of several processes, this one's part of the sum."""
        ids_BL, mask_BL, lower_BLD = inputs["ids_BL"], inputs["mask_BL"], None
        self.run.meter.count(int(mask_BL.sum()))
        if self.lower_layers is not None:
            lower_BLD = self.lower_layers.read(inputs["numbers_B"].tolist(), mask_BL)
        outputs = model(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD, lower_hidden_BLD=lower_BLD)
        loss = batch_loss(outputs.scores_B, inputs)
        return loss if self.run.processes.count == 1 else loss * inputs[SHARE]


def _scale(roles: Roles, rows: Rows, pad_id: int, probability: bool) -> dict[str, Any]:
    """Mean and standard deviation of the rewards of evenly spaced training rows, for the stamp."""
    step = max(1, len(rows.ids) // SCALE_ROWS)
    scores = score_rows(roles, rows.ids[::step], pad_id, micro_batch_size=32)
    rewards = probabilities(scores) if probability else scores
    return {
        "reward_is_probability": probability,
        "reward_mean": statistics.fmean(rewards),
        "reward_std": max(statistics.pstdev(rewards), 1e-3),
    }


def checksum(ids: list[int]) -> int:
    """CRC-32 of a row's tokens."""
    return zlib.crc32(str(ids).encode())


def recorded_scores(roles: Roles, rows: Rows, pad_id: int, chosen: Sequence[int]) -> list[Recorded]:
    """The reward role's scores of these rows, computed as one batch so that they repeat to the bit."""
    scores = score_rows(roles, [rows.ids[index] for index in chosen], pad_id, RECORDED)
    return [
        Recorded(row=index, score=score, tokens=checksum(rows.ids[index]))
        for index, score in zip(chosen, scores, strict=True)
    ]


def summary(stage: RewardStage) -> None:
    print_card("Reward model", stage.eval)
