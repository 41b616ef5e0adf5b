"""The quality metrics by which a sweep and the learning-rate search compare runs of a stage."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perl.recipe import StageName
from perl.report.outcome import at_kl, curve
from perl.report.runs import Run


@dataclass(frozen=True)
class Quality:
    """A quality metric of a stage.

    Attributes:
        value: returns the value of a run, for RL at a KL in nats per completion; None if the run has none.
        is_gold: from a judge that neither training nor the learning-rate search uses.
    """

    name: str
    value: Callable[[Run, float], float | None]
    less_is_better: bool = False
    is_gold: bool = False


def _sft_loss(run: Run, kl: float) -> float | None:
    stage = run.report.stages.sft
    return None if stage is None else stage.eval.loss_after


def _of_card(key: str) -> Callable[[Run, float], float | None]:
    def value(run: Run, kl: float) -> float | None:
        stage = run.report.stages.reward
        if stage is None or (key != "pairwise_accuracy" and stage.eval.compared):
            return None  # a model of pairs is measured only by pairwise accuracy
        found: float | None = getattr(stage.eval, key)
        return found

    return value


def _at_kl(key: str) -> Callable[[Run, float], float | None]:
    def value(run: Run, kl: float) -> float | None:
        """Return the training metric where the KL is first reached, or at the end of a run that stays below it."""
        if (found := curve(run.metrics["policy"])) is None:
            return None
        values = getattr(found, key)
        known = values[np.isfinite(values)]
        if not len(known):
            return None
        reached = at_kl(found.kl, values, kl)
        return float(known[-1]) if reached is None else reached

    return value


def _last_kl(run: Run, kl: float) -> float | None:
    stage = run.report.stages.rl
    return None if stage is None else stage.eval.kl


QUALITIES: dict[StageName, tuple[Quality, ...]] = {
    "sft": (Quality("held-out loss", _sft_loss, less_is_better=True),),
    "reward": (
        Quality("AUROC", _of_card("auroc")),
        Quality("pairwise accuracy", _of_card("pairwise_accuracy")),
        Quality("accuracy", _of_card("accuracy")),
    ),
    "rl": (
        Quality("gold at KL", _at_kl("gold"), is_gold=True),
        Quality("reward at KL", _at_kl("reward")),
        Quality("last KL", _last_kl, less_is_better=True),
    ),
}


def qualities(stage: StageName, run: Run) -> list[Quality]:
    """Return the metrics that a run has, the decisive one first: for models of pairs, pairwise accuracy."""
    return [one for one in QUALITIES[stage] if one.value(run, math.inf) is not None]
