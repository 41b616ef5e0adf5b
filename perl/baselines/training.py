"""KTO and DPO by TRL's own trainers, on the ratings that the reward model learns from.

What is trained is the role `policy` on the shared base, which begins as a copy of the reference, as in RL. Our
adapters are not peft's: TRL takes base and adapter for a whole model, and would load another as the reference.
With `precompute_ref_log_probs` it does not: it reads the reference's log-probs off the policy before the first
step, when both are the same. One base is in memory, which the measured peak shows.

KTO: Ethayarajh et al. 2024, arXiv 2402.01306. DPO: Rafailov et al. 2023, arXiv 2305.18290. Both with TRL's β, 0.1.
"""

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

from perl.baselines.rows import Row, dpo_rows, kto_rows
from perl.data.records import Records
from perl.measure.cost import Cost
from perl.measure.meter import Meter
from perl.private.trl import TokenizedDpo, TokenizedKto
from perl.roles.role import Role
from perl.stages.session import Session
from perl.stages.sft import trainable_model
from perl.stages.training_run import optimizer_steps, trainer_arguments
from perl.system.progress import Advance, console, counted, track

SNAPSHOTS = 5
"""A training is looked at after all its steps, a half, a quarter and so on."""


@dataclass(frozen=True)
class Baseline:
    """A way to train a policy on ratings or pairs."""

    learns_from: str
    rows: Callable[[Session, Records, int], list[Row]]
    trainer: Callable[..., Trainer]


@dataclass(frozen=True)
class Trained:
    """What a baseline's training had and cost."""

    rows: int
    steps: int
    cost: Cost


def _kto(rows: Sequence[Row], arguments: dict[str, Any], **parts: Any) -> Trainer:
    """With both labels of equal weight in all: the lower end of what the paper's equation 8 allows."""
    ups = sum(bool(row["label"]) for row in rows)
    downs = len(rows) - ups
    weights = {"desirable_weight": max(1.0, downs / ups), "undesirable_weight": max(1.0, ups / downs)}
    return TokenizedKto(args=KTOConfig(**weights, **arguments), **parts)


def _dpo(rows: Sequence[Row], arguments: dict[str, Any], **parts: Any) -> Trainer:
    return TokenizedDpo(args=DPOConfig(**arguments), **parts)


BASELINES = {"kto": Baseline("thumbs", kto_rows, _kto), "dpo": Baseline("pairs", dpo_rows, _dpo)}
"""By name; a line each."""


def train_baseline(session: Session, name: str, rate: float, snapshot: Callable[[int], None]) -> Trained:
    """Train the role `policy`, which the session has, for as long as the reward model was trained.

    Args:
        rate: the learning rate at its highest; all else is as in the section `reward`.
        snapshot: called after some of the steps, with their number, the last among them.

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
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    steps, meter = optimizer_steps(len(rows), settings), session.meter()
    console.print(f"{name}: the reference's log-probs of {counted(len(rows), 'row')} are computed before step 1")
    with (
        tempfile.TemporaryDirectory() as scratch,
        trainable_model(roles, Role.POLICY) as model,
        track(name, steps) as bar,
        patch_environment(TQDM_DISABLE="1"),  # TRL draws bars of its own
    ):
        arguments = trainer_arguments(settings, steps, session.recipe.seed, session.device.type, Path(scratch))
        arguments |= {"save_strategy": "no", "gradient_checkpointing": False, "precompute_ref_log_probs": True}
        arguments |= {"disable_dropout": False, "max_length": None}  # the roles and the rows see to that
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
    """Measures the steps, and looks at the policy after some of them."""

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
