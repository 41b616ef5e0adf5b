"""The reward stage: the `reward` adapter and its head learn from thumbs or pairs, on transformers' Trainer.

TRL's RewardTrainer wants a sequence classifier of its own and has no loss for thumbs, so the trainer here is
ours: it scores rows with the shared base's reward role. The loss on pairs is TRL's (a test compares them).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from perl.data.pairs import pair_ratings
from perl.data.records import Comparison, Context, Rating, Records, Turn
from perl.errors import UserError
from perl.measure.metrics import (
    accuracy,
    auroc,
    balanced_accuracy,
    expected_calibration_error,
    grouped_interval,
    reliability,
    reward_metrics,
    score_histogram,
)
from perl.model.below_cache import BelowCache
from perl.model.chat import ChatFormat
from perl.model.padding import left_pad
from perl.model.roles import Role, Roles
from perl.progress import console
from perl.rl.rewards import probabilities, score_rows
from perl.stages.session import Session
from perl.stages.training import ResumableTrainer, Watch, course

SCALE_ROWS = 512
"""Training rows whose scores give the mean and spread that RL takes off and divides by."""

INTERVALS = {
    "auroc": auroc,
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "ece": expected_calibration_error,
}


def pairs_loss(better_B: Tensor, worse_B: Tensor) -> Tensor:
    """Bradley-Terry: the mean of -log σ(r_w - r_l) (PERL, section 3; Bradley and Terry 1952)."""
    return -F.logsigmoid(better_B - worse_B).mean()


def thumbs_loss(scores_B: Tensor, labels_B: Tensor, weights_B: Tensor) -> Tensor:
    """Binary cross-entropy on the score as a log-odds, rows weighted: Σ w BCE / B."""
    return (weights_B * F.binary_cross_entropy_with_logits(scores_B, labels_B, reduction="none")).mean()


@dataclass(frozen=True)
class Rows:
    """Tokens of context and answer, with a label; in pairs the better rows come first, then the worse."""

    ids: list[list[int]]
    labels: list[bool]
    dialogues: list[str]
    gold: list[bool] | None
    pairs: list[tuple[int, int]]


def check(session: Session) -> None:
    """Refuse what the reward stage cannot use, before anything is trained or written."""
    assert session.recipe.reward is not None
    reward_rows(session, session.train, session.recipe.reward.loss)
    reward_rows(session, session.held_out, session.recipe.reward.loss)


def train_reward(session: Session) -> dict[str, Any]:
    """Train the `reward` adapter and its head, and write them; return the stage's result."""
    settings, roles = session.recipe.reward, session.roles
    assert settings is not None
    train = reward_rows(session, session.train, settings.loss)
    held_out = reward_rows(session, session.held_out, settings.loss)
    roles.add(Role.REWARD, head=True)
    roles.keep(Role.REWARD)
    trained = roles.train_only(Role.REWARD)
    examples = _examples(train, settings.loss)
    steps = -(-len(examples) // settings.batch_size) * settings.epochs
    with course(session, "reward", steps) as here:
        trainer = _RewardTrainer(
            model=roles,
            args=TrainingArguments(
                output_dir=str(here.scratch),
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                **session.trainer_settings(),
            ),
            train_dataset=Dataset.from_list(examples),
            data_collator=_Collator(session.base.chat.pad_id, session.device),
            callbacks=[Watch(here)],
        )
        trainer.course = here
        if roles.shared_blocks and settings.epochs > 1 and not (session.trial and session.trial.abridged):
            trainer.kept_below = BelowCache(roles, train.ids, session.base.chat.pad_id, here.scratch)
        trainer.remove_callback(PrinterCallback)
        trainer.go_on()
    result = {"trainable_parameters": sum(parameter.numel() for parameter in trained), **here.meter.figures()}
    if trainer.kept_below is not None:
        result["kept_below_bytes"] = trainer.kept_below.bytes
    if session.trial is not None:
        return result | {"step_seconds": here.meter.step_seconds}
    roles.eval()
    scale = _scale(roles, train, session.base.chat.pad_id, settings.loss == "thumbs")
    session.save(Role.REWARD, **scale)
    return {**result, "eval": evaluate_rows(roles, held_out, session.base.chat.pad_id)}


def reward_rows(session: Session, records: Records, loss: str) -> Rows:
    """The rated or compared answers as tokens, older context cut off first.

    Raises:
        UserError: no rows of the kind the loss needs, or ratings of one class only.
    """
    assert session.recipe.reward is not None
    length = min(session.recipe.reward.max_length, session.base.context_length)
    source = session.recipe.data.source
    return tokenize_rows(session.base.chat, records, loss, length, source)


def tokenize_rows(chat: ChatFormat, records: Records, loss: str, length: int, source: str) -> Rows:
    """As `reward_rows`, from plain values."""

    def tokens(context: Context, answer: Turn) -> list[int]:
        return chat.dialogue(context, [answer]).last(length).ids

    comparisons = records.comparisons or pair_ratings(records.ratings)
    if loss == "pairs" or not records.ratings:
        if not comparisons:
            raise UserError(
                f"{source} has no pairs, nor ratings of one context with both labels",
                where="reward.loss",
                remedy="Set reward.loss: thumbs, or use data with chosen and rejected answers.",
            )
        return _pair_rows(comparisons, tokens)
    if loss == "thumbs":
        _refuse_one_class(records.ratings, source)
    return Rows(
        ids=[tokens(rating.context, rating.answer) for rating in records.ratings],
        labels=[rating.label for rating in records.ratings],
        dialogues=[rating.dialogue for rating in records.ratings],
        gold=_gold(records.ratings),
        pairs=[],
    )


def _pair_rows(comparisons: Sequence[Comparison], tokens: Any) -> Rows:
    count = len(comparisons)
    better = [tokens(comparison.context, comparison.better) for comparison in comparisons]
    worse = [tokens(comparison.context, comparison.worse) for comparison in comparisons]
    return Rows(
        ids=better + worse,
        labels=[True] * count + [False] * count,
        dialogues=[comparison.dialogue for comparison in comparisons] * 2,
        gold=None,
        pairs=[(index, count + index) for index in range(count)],
    )


def _refuse_one_class(ratings: Sequence[Rating], source: str) -> None:
    up = sum(rating.label for rating in ratings)
    if up in (0, len(ratings)):
        raise UserError(
            f"all {len(ratings)} ratings are thumbs {'up' if up else 'down'}: there is nothing to tell apart",
            where=f"data.source {source}",
            remedy="Add ratings of the other kind.",
        )


def _gold(ratings: Sequence[Rating]) -> list[bool] | None:
    gold = [rating.gold for rating in ratings if rating.gold is not None]
    return gold if len(gold) == len(ratings) else None


def _examples(rows: Rows, loss: str) -> list[dict[str, Any]]:
    """What the trainer shuffles: a row with its label and weight, or a pair of rows."""
    if loss == "pairs":
        return [
            {
                "rows": [rows.ids[better], rows.ids[worse]],
                "numbers": [better, worse],
                "length": max(len(rows.ids[better]), len(rows.ids[worse])),
            }
            for better, worse in rows.pairs
        ]
    # Either class weighs half, however rare it is: Σ over the data of the weights is the number of rows.
    up = sum(rows.labels)
    weight = {True: len(rows.labels) / (2 * up), False: len(rows.labels) / (2 * (len(rows.labels) - up))}
    return [
        {"rows": [ids], "numbers": [number], "label": float(label), "weight": weight[label], "length": len(ids)}
        for number, (ids, label) in enumerate(zip(rows.ids, rows.labels, strict=True))
    ]


@dataclass(frozen=True)
class _Collator:
    """Examples to one padded batch; the better rows of pairs first, then the worse."""

    pad_id: int
    device: torch.device

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        def together(key: str) -> list[Any]:
            return [example[key][place] for place in range(len(examples[0][key])) for example in examples]

        ids_BL, mask_BL = left_pad(together("rows"), self.pad_id, torch.device("cpu"))
        batch = {"ids_BL": ids_BL, "mask_BL": mask_BL, "numbers_B": torch.tensor(together("numbers"))}
        if "label" in examples[0]:
            batch["labels_B"] = torch.tensor([example["label"] for example in examples])
            batch["weights_B"] = torch.tensor([example["weight"] for example in examples])
        return batch


class _RewardTrainer(ResumableTrainer):
    """transformers' Trainer on the reward role."""

    kept_below: BelowCache | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.course.meter.count(int(inputs["mask_BL"].sum()))
        ids_BL, mask_BL, below_BLD = inputs["ids_BL"], inputs["mask_BL"], None
        if self.kept_below is not None:
            below_BLD = self.kept_below.read(inputs["numbers_B"].tolist(), mask_BL)
        scores_B = model(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD, below_BLD=below_BLD).scores_B
        if "labels_B" in inputs:
            return thumbs_loss(scores_B, inputs["labels_B"], inputs["weights_B"])
        return pairs_loss(*scores_B.chunk(2))


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


def evaluate_rows(roles: Roles, rows: Rows, pad_id: int) -> dict[str, Any]:
    """The reward role's metrics; against the gold judgement where the source has one, and says so."""
    scores = score_rows(roles, rows.ids, pad_id, micro_batch_size=32)
    if any(not math.isfinite(score) for score in scores):
        raise FloatingPointError("the reward model's scores are not finite: lower reward.learning_rate")
    truth = rows.gold if rows.gold is not None else rows.labels
    figures: dict[str, Any] = reward_metrics(scores, truth, rows.pairs or None).as_json()
    figures["against"] = "gold" if rows.gold is not None else "labels"
    if rows.gold is not None:
        figures["auroc_labels"] = reward_metrics(scores, rows.labels).auroc
    figures["intervals"] = {
        name: grouped_interval(metric, scores, truth, rows.dialogues, seed=0) for name, metric in INTERVALS.items()
    }
    figures["reliability"] = reliability(scores, truth)
    figures["score_histogram"] = score_histogram(scores, truth)
    return figures


def summary(result: dict[str, Any]) -> None:
    """Say in words what the reward model can tell apart."""
    figures = result["eval"]
    against = "the gold judge says" if figures["against"] == "gold" else "people say"
    if figures["auroc"] is None:
        told = "the held-out rows are all of one class, so nothing can be said"
    else:
        told = f"of a good and a bad answer it scores the good one higher {figures['auroc']:.0%} of the time"
    console.print(
        f"[bold]Reward model[/]: on {figures['n']} held-out answers, {told} (AUROC against what {against}). "
        f"Accuracy {figures['accuracy']:.0%}, where always giving the commoner label has "
        f"{figures['majority_accuracy']:.0%}; balanced {figures['balanced_accuracy']:.0%}."
    )
