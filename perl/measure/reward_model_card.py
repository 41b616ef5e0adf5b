"""The reward model card: all metrics of a reward model on held-out completions, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perl.data.records import Context
from perl.measure.bootstrap import ClusterBootstrap, Estimate, Floats, Interval, Statistic
from perl.measure.calibration import Calibration, calibrate, predictions
from perl.measure.ensemble import Ensemble, disagreement, ensemble_metrics, ensemble_scores
from perl.measure.length import LengthBias, length_bias, length_bias_of_pairs
from perl.measure.metrics import (
    Labels,
    ReliabilityBin,
    ScoreHistogram,
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
from perl.measure.ranking import Metric, Ranking, metric_of, ranking_of
from perl.measure.rated_rows import RatedRows
from perl.measure.slices import Slice, slices
from perl.measure.tfidf_baseline import TfidfBaseline, TfidfScores, tfidf_baseline
from perl.measure.verdict import Verdict, verdict

MISTAKES = 5
"""Number of worst mistakes of either kind."""
SHOWN_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A completion that was scored wrongly.

    Attributes:
        score: for pairs, the score minus that of the other completion.
        probability: probability of a thumb up; for pairs, of being the better completion.
    """

    context: str
    answer: str
    score: float
    probability: float


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """The downs with the highest and the ups with the lowest scores."""

    downs_scored_high: list[Mistake]
    ups_scored_low: list[Mistake]


@dataclass(frozen=True, kw_only=True)
class RewardMetrics:
    """The metrics of a reward model.

    Rankings, accuracies, `ece` and `reliability` are measured against the gold judgement if there is one, the
    probabilities in `calibration` always against the thumbs. If there are ratings and pairs, the pairs are used
    only for the pairwise accuracy. If there are only pairs (`compared`), only differences of scores are meaningful
    (`perl.measure.ranking`): the score of a completion is the difference from the other one of its pair, and the
    AUROC is of these differences.

    Attributes:
        ensemble: the members and their disagreement, if there are several.
        seen_in_training: number of completions from training dialogues, or nearly equal to a training row.
        intervals: 95 % intervals, by the name of the metric.
    """

    n: int
    up: int
    dialogues: int
    seen_in_training: int
    against: Literal["gold", "labels"]
    auroc: float | None
    auroc_labels: float | None = None
    pairwise_accuracy: float | None = None
    balanced_accuracy: float
    accuracy: float
    majority_accuracy: float
    ece: float
    compared: bool
    pairs: int
    intervals: dict[str, Interval | None]
    reliability: list[ReliabilityBin]
    score_histogram: ScoreHistogram
    calibration: Calibration
    slices: list[Slice]
    length: LengthBias
    tfidf_baseline: TfidfBaseline
    mistakes: Mistakes
    ensemble: Ensemble | None = None

    @property
    def metric(self) -> Metric:
        """The metric of the ranking."""
        return metric_of(self.compared)

    @property
    def ranked(self) -> tuple[float | None, Interval | None]:
        """The value and interval of that metric."""
        value, name = (self.pairwise_accuracy, "pairwise_accuracy") if self.compared else (self.auroc, "auroc")
        return value, self.intervals.get(name)


@dataclass(frozen=True, kw_only=True)
class RewardModelCard(RewardMetrics):
    """The metrics and the verdict."""

    verdict: Verdict


def reward_model_card(
    scores: Sequence[float] | Floats,
    all_rows: RatedRows,
    baseline: TfidfScores,
    seen: int = 0,
    log_odds: bool = True,
) -> RewardModelCard:
    """Return the card of a reward model.

    Args:
        scores: one per completion; for an ensemble (M, N), one row per member.
        log_odds: whether they are log-odds of a thumb up, which determines how an ensemble's score is computed.
        baseline: TF-IDF's scores of the completions with labels.
        seen: number of these on which the model was trained.

    Raises:
        ValueError: scores are not finite, or their number differs from that of the completions.
    """
    rows, scores_MN = all_rows.labelled(), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    scores = ensemble_scores(scores_MN, log_odds)
    score_N, truth_N = checked(scores[: len(rows.labels)], rows.truth)
    ranking = ranking_of(scores_MN[:, : len(score_N)], score_N, truth_N, rows)
    bootstrap, pairs = ClusterBootstrap(rows.dialogues, seed=0), all_rows.ranked_pairs()
    of_words = tfidf_baseline(score_N, rows, baseline, truth_N, bootstrap)
    calibration, log_odds_N = calibrate(predictions(score_N, rows))
    of_ranked = bootstrap
    if rows.compared:
        of_ranked = ClusterBootstrap(ranking.rows.dialogues, seed=0)
        log_odds_N, log_odds = None, False
        score_N = _score_differences(score_N, rows.pairs)
    estimates = _estimates(score_N, truth_N, rows, bootstrap) | _pairwise(scores, pairs, all_rows.dialogues)
    values = {name: estimate.value for name, estimate in estimates.items()}
    up = int(truth_N.sum())
    metrics = RewardMetrics(
        n=len(score_N),
        up=up,
        dialogues=len(set(rows.dialogues)),
        seen_in_training=seen,
        against="labels" if rows.gold is None else "gold",
        auroc=values["auroc"],
        auroc_labels=values.get("auroc_labels"),
        pairwise_accuracy=values.get("pairwise_accuracy"),
        balanced_accuracy=_known(values["balanced_accuracy"]),
        accuracy=_known(values["accuracy"]),
        majority_accuracy=max(up, len(score_N) - up) / len(score_N),
        ece=calibration.ece_before if rows.compared else calibration_error(score_N, truth_N),
        compared=rows.compared,
        pairs=len(pairs),
        intervals={name: estimate.interval for name, estimate in estimates.items()},
        reliability=calibration.reliability_before if rows.compared else reliability(score_N, truth_N),
        score_histogram=score_histogram(score_N, truth_N),
        calibration=calibration,
        slices=slices(ranking, log_odds_N, of_ranked),
        length=_length(ranking, of_ranked),
        tfidf_baseline=of_words,
        mistakes=_mistakes(score_N, truth_N, rows),
        ensemble=_ensemble(ranking, log_odds, of_ranked),
    )
    return RewardModelCard(**vars(metrics), verdict=verdict(metrics))


def _estimates(
    score_N: Floats, truth_N: Labels, rows: RatedRows, bootstrap: ClusterBootstrap
) -> dict[str, Estimate]:
    statistics: dict[str, Statistic] = {
        "auroc": auroc(score_N, truth_N),
        "balanced_accuracy": balanced_accuracy(score_N, truth_N),
        "accuracy": accuracy(score_N, truth_N),
    }
    if rows.gold is not None:
        statistics["auroc_labels"] = auroc(score_N, np.asarray(rows.labels, dtype=np.int64))
    return {name: bootstrap.estimate(statistic) for name, statistic in statistics.items()}


def _pairwise(scores: Floats, pairs: Sequence[tuple[int, int]], dialogues: Sequence[str]) -> dict[str, Estimate]:
    """Return the pairwise accuracy on all rows; empty if there are no pairs."""
    if not pairs:
        return {}
    bootstrap = ClusterBootstrap(dialogues, seed=0)
    return {"pairwise_accuracy": bootstrap.estimate(pairwise_accuracy(scores, pairs))}


def _length(ranking: Ranking, bootstrap: ClusterBootstrap) -> LengthBias:
    if ranking.compared:
        return length_bias_of_pairs(ranking.score_N, ranking.length_N, bootstrap)
    return length_bias(ranking.score_N, ranking.length_N, ranking.truth_N, bootstrap)


def _ensemble(ranking: Ranking, log_odds: bool, bootstrap: ClusterBootstrap) -> Ensemble | None:
    """Return the metrics of an ensemble; None for a single model."""
    if len(ranking.members_MN) < 2:
        return None
    return ensemble_metrics(ranking, disagreement(ranking.members_MN, log_odds), bootstrap)


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _score_differences(scores: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Return each completion's score minus that of the other completion of its pair."""
    better, worse = np.asarray(pairs, dtype=np.int64).T
    difference, differences = scores[better] - scores[worse], np.zeros_like(scores)
    differences[better], differences[worse] = difference, -difference
    return differences


def _mistakes(scores: Floats, truth: Labels, rows: RatedRows) -> Mistakes:
    """Return the worst mistakes, for people to read; for pairs, both completions of each."""
    order, p = np.argsort(scores, kind="stable"), probabilities(scores)

    def mistake(index: int) -> Mistake:
        text = rows.answers[index].text
        return Mistake(
            context=_tail(rows.contexts[index]),
            answer=text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …",
            score=float(scores[index]),
            probability=float(p[index]),
        )

    if rows.compared:  # both lists in the same order; a pair in the right order is not a mistake
        wrong = [pair for pair in rows.pairs if scores[pair[0]] < 0]
        worst = sorted(wrong, key=lambda pair: float(scores[pair[0]]))[:MISTAKES]
        return Mistakes(
            downs_scored_high=[mistake(worse) for _, worse in worst],
            ups_scored_low=[mistake(better) for better, _ in worst],
        )
    return Mistakes(
        downs_scored_high=[mistake(index) for index in order[::-1][truth[order[::-1]] == 0][:MISTAKES]],
        ups_scored_low=[mistake(index) for index in order[truth[order] == 1][:MISTAKES]],
    )


def _tail(context: Context) -> str:
    """Return the end of a context, as lines with their speakers; plain text is unchanged."""
    lines = [turn.text if turn.speaker == "text" else f"{turn.speaker}: {turn.text}" for turn in context]
    text = "\n".join(lines)
    return text if len(text) <= SHOWN_CHARACTERS else f"… {text[-SHOWN_CHARACTERS:]}"
