"""The reward stage: the `reward` adapter and its head learn from thumbs, pairs or both, on transformers' Trainer.

TRL's RewardTrainer wants a sequence classifier of its own and has no loss for thumbs, so the trainer here is
ours: it scores rows with the shared base's reward role. The loss on pairs is TRL's, margins included (a test
compares them); soft labels are ours.
"""

import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from perl.backbones.chat import ChatFormat
from perl.data.pairs import pair_ratings
from perl.data.records import Comparison, Prompt, Rating, Records
from perl.errors import UserError
from perl.measure.rated_rows import RatedRows
from perl.results import Recorded, RewardStage, Tried
from perl.rl.rewards.model import probabilities, score_rows
from perl.roles.lower_layer_cache import LowerLayerCache
from perl.roles.roles import Role, Roles
from perl.stages.cut_rows import say_cut
from perl.stages.reward_card import evaluate_rows, print_card
from perl.stages.reward_loss import Collator, batch_loss
from perl.stages.session import Session
from perl.stages.training import SHARE, ResumableTrainer, Watch, training_run

RECORDED = 8
"""Held-out rows whose scores are written down, for others to check that they score alike."""
SCALE_ROWS = 512
"""Training rows whose scores give the mean and spread that RL takes off and divides by."""


@dataclass(frozen=True)
class Rows(RatedRows):
    """Answers with their contexts as tokens.

    Attributes:
        ids: of each answer and its context.
        targets: the probability of a thumb up, or that the better (the worse) one of a pair is the better.
        margins: of the pairs.
        cut: how many were too long.
    """

    ids: list[list[int]]
    targets: list[float]
    margins: list[float]
    cut: int


def check(session: Session) -> None:
    """Refuse what the reward stage cannot use, before anything is trained or written."""
    assert session.recipe.reward is not None
    _training_rows(session)
    held_out_rows(session)


def train_reward(session: Session) -> RewardStage | Tried:
    """Train the `reward` adapter and its head, and write them; return the stage's result."""
    settings, roles = session.recipe.reward, session.roles
    assert settings is not None
    train, held_out = _training_rows(session), held_out_rows(session)
    roles.add(Role.REWARD, head=True)
    roles.keep(Role.REWARD)
    trained = roles.train_only(Role.REWARD)
    rows, cut = len(train.ids) + len(held_out.ids), train.cut + held_out.cut
    if session.trial is None:
        say_cut(cut, rows, _length(session), "reward.max_length")
    examples = _examples(train, settings.loss)
    steps = -(-len(examples) // settings.batch_size) * settings.epochs
    with training_run(session, "reward", steps) as here:
        trainer = _RewardTrainer(
            model=roles,
            args=TrainingArguments(output_dir=str(here.scratch), **session.trainer_settings(settings, steps)),
            train_dataset=Dataset.from_list(examples),
            data_collator=Collator(session.base.chat.pad_id),
            callbacks=[Watch(here)],
        )
        trainer.run = here
        if roles.shared_blocks and settings.epochs > 1 and not (session.trial and session.trial.abridged):
            trainer.kept_below = LowerLayerCache(roles, train.ids, session.base.chat.pad_id, here.scratch)
        trainer.remove_callback(PrinterCallback)
        trainer.resume()
    stage = session.stage(here.meter, trained, rows, cut)
    if session.trial is not None:
        return Tried(**vars(stage), step_seconds=here.meter.step_seconds)
    roles.eval()
    scale = _scale(roles, train, session.base.chat.pad_id, settings.loss != "pairs")
    session.save(Role.REWARD, **scale)
    pad_id = session.base.chat.pad_id
    chosen = range(0, len(held_out.ids), -(-len(held_out.ids) // RECORDED))
    return RewardStage(
        **vars(stage),
        kept_below_bytes=None if trainer.kept_below is None else trainer.kept_below.bytes,
        recorded=recorded_scores(roles, held_out, pad_id, chosen),
        eval=evaluate_rows(roles, held_out.ids, held_out, train, pad_id),
    )


def _training_rows(session: Session) -> Rows:
    """What the reward model learns from.

    Raises:
        UserError: no rows of the kind the loss needs, or ratings of one class only.
    """
    assert session.recipe.reward is not None
    rows = _reward_rows(session, session.train, session.recipe.reward.loss)
    if len(set(rows.labels)) < 2:
        raise UserError(
            f"all {len(rows.labels)} ratings are thumbs {'up' if rows.labels[0] else 'down'}: there is nothing to "
            "tell apart",
            where=f"data.source {session.recipe.data.source}",
            remedy="Add ratings of the other kind.",
        )
    return rows


def held_out_rows(session: Session) -> Rows:
    """What it is judged on: rows of the kind that it learns from; of too few data perhaps only the other kind.

    Raises:
        UserError: nothing is rated or compared.
    """
    assert session.recipe.reward is not None
    records = session.held_out
    loss: str = session.recipe.reward.loss
    paired = bool(records.comparisons or pair_ratings(records.ratings))
    if (loss != "thumbs" and not paired) or (loss == "both" and not records.ratings):
        loss = "any"
    return _reward_rows(session, records, loss)


def _reward_rows(session: Session, records: Records, loss: str) -> Rows:
    """The rated or compared answers as tokens, oldest turns left out first."""
    return tokenize_rows(session.base.chat, records, loss, _length(session), session.recipe.data.source)


def _length(session: Session) -> int:
    assert session.recipe.reward is not None
    return min(session.recipe.reward.max_length, session.base.context_length)


def tokenize_rows(chat: ChatFormat, records: Records, loss: str, length: int, source: str) -> Rows:
    """The rated or compared answers as tokens of at most `length`, older context cut off first.

    Args:
        loss: which of the records are taken; `any`: ratings and comparisons as they are.

    Raises:
        UserError: none are of the kind that the loss needs.
    """
    ratings, comparisons = _chosen(records, loss, source)
    answers = _answers(ratings, comparisons, records.prompts, source)
    sure = [comparison.probability for comparison in comparisons]
    rows = [
        chat.row(context, answer, length)
        for context, answer in zip(answers.contexts, answers.answers, strict=True)
    ]
    return Rows(
        **vars(answers),
        ids=[row.ids for row in rows],
        cut=sum(row.cut for row in rows),
        targets=[_target(rating) for rating in ratings] + sure + [1 - probability for probability in sure],
        margins=[comparison.margin for comparison in comparisons],
    )


def answers_of(records: Records, loss: str, source: str) -> RatedRows:
    """The answers of `tokenize_rows`, without their tokens."""
    return _answers(*_chosen(records, loss, source), records.prompts, source)


def _chosen(records: Records, loss: str, source: str) -> tuple[list[Rating], list[Comparison]]:
    ratings = [] if loss == "pairs" else records.ratings
    comparisons = records.comparisons
    if loss in ("pairs", "both"):
        comparisons = comparisons or pair_ratings(records.ratings)
    elif loss == "thumbs" and ratings:
        comparisons = []
    _refuse_missing(ratings, comparisons, loss, source)
    return ratings, comparisons


def _answers(
    ratings: Sequence[Rating], comparisons: Sequence[Comparison], prompts: Sequence[Prompt], source: str
) -> RatedRows:
    first, count = len(ratings), len(comparisons)
    records: list[Rating | Comparison] = [*ratings, *comparisons, *comparisons]
    contexts = [record.context for record in records]
    # A row's further fields are on its prompt; rows of one file may name different sources.
    named = {prompt.context: str(prompt.columns["source"]) for prompt in prompts if "source" in prompt.columns}
    return RatedRows(
        contexts=contexts,
        answers=[one.answer for one in ratings]
        + [one.better for one in comparisons]
        + [one.worse for one in comparisons],
        dialogues=[record.dialogue for record in records],
        sources=[named.get(context, source) for context in contexts],
        labels=[rating.label for rating in ratings] or [True] * count + [False] * count,
        gold=_gold(ratings),
        pairs=[(first + index, first + count + index) for index in range(count)],
    )


def _target(rating: Rating) -> float:
    return float(rating.label) if rating.probability is None else rating.probability


def _refuse_missing(ratings: Sequence[Rating], comparisons: Sequence[Comparison], loss: str, source: str) -> None:
    if not comparisons and (loss in ("pairs", "both") or not ratings):
        raise UserError(
            f"{source} has no pairs, nor ratings of one context with both labels",
            where="reward.loss",
            remedy="Set reward.loss: thumbs, or use data with chosen and rejected answers.",
        )
    if loss == "both" and not ratings:
        raise UserError(
            f"{source} has no ratings, only pairs",
            where="reward.loss",
            remedy="Set reward.loss: pairs, or add rows with completion and label.",
        )


def _gold(ratings: Sequence[Rating]) -> list[bool] | None:
    gold = [rating.gold for rating in ratings if rating.gold is not None]
    return gold if gold and len(gold) == len(ratings) else None


def _examples(rows: Rows, loss: str) -> list[dict[str, Any]]:
    """What the trainer shuffles: answers with labels, pairs of answers, or both."""
    examples = [] if loss == "pairs" else _thumbs(rows)
    if loss != "thumbs":
        for (better, worse), margin in zip(rows.pairs, rows.margins, strict=True):
            examples.append(_example(rows, [better, worse], margin=margin))
    return examples


def _thumbs(rows: Rows) -> list[dict[str, Any]]:
    # Either class weighs half, however rare it is: Σ over the data of the weights is the number of rows.
    up = sum(rows.labels)
    weight = {True: len(rows.labels) / (2 * up), False: len(rows.labels) / (2 * (len(rows.labels) - up))}
    return [_example(rows, [number], weight=weight[label]) for number, label in enumerate(rows.labels)]


def _example(rows: Rows, numbers: list[int], margin: float = 0.0, weight: float = 1.0) -> dict[str, Any]:
    """One answer, or the better and the worse of a pair; they count alike in the mean of a batch."""
    return {
        "rows": [rows.ids[number] for number in numbers],
        "numbers": numbers,
        "target": rows.targets[numbers[0]],
        "margin": margin,
        "weight": weight,
        "length": max(len(rows.ids[number]) for number in numbers),
    }


class _RewardTrainer(ResumableTrainer):
    """transformers' Trainer on the reward role."""

    kept_below: LowerLayerCache | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.run.meter.count(int(inputs["mask_BL"].sum()))
        ids_BL, mask_BL, lower_hidden_BLD = inputs["ids_BL"], inputs["mask_BL"], None
        if self.kept_below is not None:
            lower_hidden_BLD = self.kept_below.read(inputs["numbers_B"].tolist(), mask_BL)
        scores_B = model(
            Role.REWARD, ids_BL, mask_BL, head=Role.REWARD, lower_hidden_BLD=lower_hidden_BLD
        ).scores_B
        loss, share = batch_loss(scores_B, inputs), inputs[SHARE]
        return loss if self.run.processes.count == 1 else loss * share


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
    """The reward role's scores of these rows, and a checksum of their tokens.

    The scores are always computed as one batch, so that they repeat to the bit.
    """
    scores = score_rows(roles, [rows.ids[index] for index in chosen], pad_id, RECORDED)
    return [
        Recorded(row=index, score=score, tokens=checksum(rows.ids[index]))
        for index, score in zip(chosen, scores, strict=True)
    ]


def summary(stage: RewardStage) -> None:
    """Say in words whether the reward model can be trusted."""
    print_card("Reward model", stage.eval)
