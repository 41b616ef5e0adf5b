"""The reward model's report card: all its metrics on held-out answers, as JSON, and the verdict on them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from perl.data.records import Context
from perl.measure.answers import Answers
from perl.measure.bootstrap import Estimate, Figure, Floats, Resampled
from perl.measure.calibration import calibration, judged
from perl.measure.length import length_bias
from perl.measure.metrics import (
    Labels,
    accuracy,
    auroc,
    balanced_accuracy,
    calibration_error,
    checked,
    pairwise_accuracy,
    probabilities,
    reliability,
    score_histogram,
)
from perl.measure.slices import slices
from perl.measure.tfidf_baseline import Floor
from perl.measure.verdict import verdict

MISTAKES = 5
"""Worst mistakes of either kind."""
SHOWN_CHARACTERS = 300


def reward_card(scores: Sequence[float], everything: Answers, floor: Floor, seen: int = 0) -> dict[str, Any]:
    """All metrics of a reward model, as JSON.

    Rankings and accuracies are against the gold judgement where there is one; probabilities are always held
    against the thumbs they are probabilities of. Where there are ratings and pairs, the pairs are for the
    pairwise accuracy alone.

    Args:
        scores: log-odds, one an answer.
        everything: the answers.
        floor: what counting words comes to on those with labels.
        seen: how many of those the model was trained on: their dialogue, or a row that says nearly the same.

    Raises:
        ValueError: scores that are not finite, or of another number than the answers.
    """
    answers = everything.labelled()
    score, truth = checked(scores[: len(answers.labels)], answers.truth)
    resampled = Resampled(answers.dialogues, seed=0)
    metrics: dict[str, Figure] = {
        "auroc": auroc(score, truth),
        "balanced_accuracy": balanced_accuracy(score, truth),
        "accuracy": accuracy(score, truth),
        "ece": calibration_error(score, truth),
    }
    if answers.gold is not None:
        metrics["auroc_labels"] = auroc(score, np.asarray(answers.labels, dtype=np.int64))
    found = {name: resampled.estimate(figure) for name, figure in metrics.items()}
    pairs = everything.ranked_pairs()
    if pairs:
        all_resampled = Resampled(everything.dialogues, seed=0)
        found["pairwise_accuracy"] = all_resampled.estimate(pairwise_accuracy(np.asarray(scores), pairs))
    of = judged(score, answers)
    calibrated, log_odds = calibration(of)
    up = int(truth.sum())
    ranking, lengths = score, np.array([len(answer.text) for answer in answers.answers], dtype=np.float64)
    if answers.compared:  # only differences of two answers to one context mean something
        ranking, lengths = _less_their_mean(score, answers.pairs), _less_their_mean(lengths, answers.pairs)
    card = {
        "n": len(score),
        "up": up,
        "dialogues": len(set(answers.dialogues)),
        "seen_in_training": seen,
        "against": "labels" if answers.gold is None else "gold",
        **{name: one.value for name, one in found.items()},
        "majority_accuracy": max(up, len(score) - up) / len(score),
        "compared": answers.compared,
        "pairs": len(pairs),
        "intervals": {name: one.interval for name, one in found.items()},
        "reliability": reliability(score, truth),
        "score_histogram": score_histogram(score, truth),
        "calibration": calibrated,
        "slices": slices(ranking, truth, None if answers.compared else log_odds, answers, resampled),
        "length": length_bias(ranking, lengths, truth, resampled),
        "floor": _beside_floor(score, answers, floor, truth, resampled),
        "mistakes": _mistakes(score, truth, answers),
    }
    return card | {"verdict": asdict(verdict(card))}


def _less_their_mean(values: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Each value of a pair less the mean of the two."""
    better, worse = np.asarray(pairs, dtype=np.int64).T
    half, less = (values[better] - values[worse]) / 2, np.zeros_like(values)
    less[better], less[worse] = half, -half
    return less


def _beside_floor(
    scores: Floats, answers: Answers, floor: Floor, truth: Labels, resampled: Resampled
) -> dict[str, Any]:
    """The floor's figure, and by how much the model is ahead: a paired interval.

    The figure is the AUROC; of compared answers, of which only differences mean something, pairwise accuracy.
    """

    def ranking(of: Floats) -> Figure:
        return pairwise_accuracy(of, answers.pairs) if answers.compared else auroc(of, truth)

    model, words = ranking(scores), ranking(floor.scores)
    alone = resampled.estimate(words)
    ahead = resampled.estimate(lambda weights_SN: model(weights_SN) - words(weights_SN))
    return {
        "figure": "pairwise_accuracy" if answers.compared else "auroc",
        **_as_json("value", alone),
        **_as_json("ahead", ahead),
        "rows": floor.rows,
        "of_rows": floor.of_rows,
    }


def _as_json(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_interval": estimate.interval}


def _mistakes(scores: Floats, truth: Labels, answers: Answers) -> dict[str, list[dict[str, Any]]]:
    """The downs that score highest and the ups that score lowest, for people to read."""
    order = np.argsort(scores, kind="stable")
    chosen = {
        "downs_scored_high": [index for index in order[::-1] if not truth[index]],
        "ups_scored_low": [index for index in order if truth[index]],
    }
    given = probabilities(scores)
    return {
        kind: [
            {
                "context": _tail(answers.contexts[index]),
                "answer": _cut(answers.answers[index].text),
                "score": float(scores[index]),
                "probability": float(given[index]),
            }
            for index in rows[:MISTAKES]
        ]
        for kind, rows in chosen.items()
    }


def _tail(context: Context) -> str:
    """The end of a context, as lines of who said what; plain text as it stands."""
    lines = [turn.text if turn.speaker == "text" else f"{turn.speaker}: {turn.text}" for turn in context]
    text = "\n".join(lines)
    return text if len(text) <= SHOWN_CHARACTERS else f"… {text[-SHOWN_CHARACTERS:]}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
