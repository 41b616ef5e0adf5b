"""KTO and DPO with TRL's trainers, on the ratings that the reward model is trained on.

They train the role `policy` on the shared base, which starts as a copy of the reference, as in RL. Our adapters
are not peft's, so TRL would take base and adapter for a whole model and load another as the reference. With
`precompute_ref_log_probs`, it instead computes the reference's log-probs with the policy before the first step,
when both are the same. Only one base is in memory, as the measured peak shows.

KTO: Ethayarajh et al. 2024, arXiv 2402.01306. DPO: Rafailov et al. 2023, arXiv 2305.18290. Both use TRL's β, 0.1.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig, KTOConfig

from perl.data.pairs import to_compare
from perl.data.records import Context, Records, Turn
from perl.errors import UserError
from perl.measure.cost import Cost
from perl.measure.meter import Meter
from perl.private.trl import TokenizedDpo, TokenizedKto
from perl.roles.role import Role
from perl.stages.adamw import exact_on_average
from perl.stages.session import Session
from perl.stages.sft import trainable_model
from perl.stages.training_run import optimizer_steps, trainer_arguments
from perl.system.progress import Advance, console, counted, track

SNAPSHOTS = 5
"""Number of policies to evaluate: after all steps, half of them, a quarter and so on."""
Row = dict[str, list[int] | bool]
"""For KTO `prompt_ids`, `completion_ids`, `KL_completion_ids` and `label`; for DPO `prompt_ids`, `chosen_ids` and
`rejected_ids`. Completions include their end token."""


@dataclass(frozen=True)
class Baseline:
    """A way to train a policy on ratings or pairs."""

    learns_from: str
    rows: Callable[[Session, Records, int], list[Row]]
    trainer: Callable[..., Trainer]


@dataclass(frozen=True)
class Trained:
    """The size and cost of a baseline's training."""

    rows: int
    steps: int
    cost: Cost


def kto_rows(session: Session, records: Records, batch_size: int) -> list[Row]:
    """Return the ratings in an order that depends only on the seed and that the trainer keeps.

    `KL_completion_ids` are the completion of another prompt in the batch, with which KTO estimates its KL. A last
    batch of one row is left out, because it has no other prompt.

    Raises:
        UserError: there are no ratings with both labels.
    """
    ratings = list(records.ratings)
    if len({one.label for one in ratings}) < 2:
        raise UserError(
            f"{session.recipe.data.source} has no ratings with both labels to train on",
            where="--baselines kto",
            remedy="Leave kto out, or add rows with prompt, completion and label.",
        )
    random.Random(session.recipe.seed).shuffle(ratings)
    rows: list[Row] = []
    for one in ratings:
        prompt, (completion,) = _ids(session, one.context, [one.answer])
        rows.append({"prompt_ids": prompt, "completion_ids": completion, "label": one.label})
    if len(rows) % batch_size == 1:
        rows.pop()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for row, other in zip(batch, [batch[-1], *batch], strict=False):
            row["KL_completion_ids"] = other["completion_ids"]
    return rows


def dpo_rows(session: Session, records: Records, batch_size: int) -> list[Row]:
    """Return the comparisons, or the pairs from ratings of one context with both labels.

    Raises:
        UserError: there are none.
    """
    pairs = to_compare(records, "pairs")
    if not pairs:
        raise UserError(
            f"{session.recipe.data.source} has neither pairs nor ratings of one context with both labels",
            where="--baselines dpo",
            remedy="Leave dpo out, or use data with chosen and rejected answers.",
        )
    rows: list[Row] = []
    for pair in pairs:
        prompt, (chosen, rejected) = _ids(session, pair.context, [pair.better, pair.worse])
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def _ids(session: Session, context: Context, answers: Sequence[Turn]) -> tuple[list[int], list[list[int]]]:
    """Return a prompt as in RL, truncated to fit its completions as in reward modelling, and the completions."""
    chat, length = session.base.chat, session.max_length("reward")
    completions = [chat.completion(context, answer)[-length + 1 :] for answer in answers]
    return chat.context(context, length - max(map(len, completions))), completions


def _kto(rows: Sequence[Row], arguments: dict[str, Any], **parts: Any) -> Trainer:
    """Create the trainer with equal total weight for both labels, the lower bound in the paper's equation 8."""
    ups = sum(bool(row["label"]) for row in rows)
    downs = len(rows) - ups
    weights = {"desirable_weight": max(1.0, downs / ups), "undesirable_weight": max(1.0, ups / downs)}
    return TokenizedKto(args=KTOConfig(**weights, **arguments), **parts)


def _dpo(rows: Sequence[Row], arguments: dict[str, Any], **parts: Any) -> Trainer:
    return TokenizedDpo(args=DPOConfig(**arguments), **parts)


BASELINES = {"kto": Baseline("thumbs", kto_rows, _kto), "dpo": Baseline("pairs", dpo_rows, _dpo)}
"""The baselines by name; one line each."""


def train_baseline(session: Session, name: str, rate: float, snapshot: Callable[[int], None]) -> Trained:
    """Train the session's role `policy` for as many epochs as the reward model.

    Args:
        rate: the peak learning rate; all other settings are those of the section `reward`.
        snapshot: called with the step number after some of the steps, including the last.

    Raises:
        UserError: there is nothing to train on.
    """
    baseline, roles, settings = BASELINES[name], session.roles, session.recipe.reward
    assert settings is not None
    settings = settings.model_copy(update={"learning_rate": rate})
    rows = baseline.rows(session, session.train, settings.batch_size)
    roles.train_only(Role.POLICY)
    groups = [
        {"params": weights, "lr": rate * ratio}
        for ratio, weights in roles.by_learning_rate(Role.POLICY).items()
        if weights
    ]
    optimizer = exact_on_average(torch.optim.AdamW(groups, weight_decay=settings.weight_decay))
    steps, meter = optimizer_steps(len(rows), settings), session.meter()
    console.print(f"{name}: computing the reference's log-probs of {counted(len(rows), 'row')} before step 1")
    with (
        tempfile.TemporaryDirectory() as scratch,
        trainable_model(roles, Role.POLICY) as model,
        track(name, steps) as bar,
        patch_environment(TQDM_DISABLE="1"),  # no progress bars by TRL
    ):
        arguments = trainer_arguments(settings, steps, session.recipe.seed, session.device.type, Path(scratch))
        arguments |= {"save_strategy": "no", "gradient_checkpointing": False, "precompute_ref_log_probs": True}
        arguments |= {"disable_dropout": False, "max_length": None}  # handled by the roles and the rows
        trainer = baseline.trainer(
            rows,
            arguments,
            model=model,
            train_dataset=Dataset.from_list(rows),
            processing_class=session.base.tokenizer,
            callbacks=[_Steps(meter, bar, {max(1, steps >> k) for k in range(SNAPSHOTS)}, snapshot)],
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Trained(len(rows), steps, meter.cost())


class _Steps(TrainerCallback):
    """Measures the steps, and evaluates the policy after some of them."""

    def __init__(self, meter: Meter, bar: Advance, looked_at: set[int], snapshot: Callable[[int], None]) -> None:
        self._meter, self._bar, self._looked_at, self._snapshot = meter, bar, looked_at, snapshot
        self._step: AbstractContextManager[object] = nullcontext()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = self._meter.step(kwargs["optimizer"])
        self._step.__enter__()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step.__exit__(None, None, None)
        self._bar()
        if state.global_step in self._looked_at:
            self._snapshot(state.global_step)
