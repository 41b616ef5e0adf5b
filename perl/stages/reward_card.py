"""Computes the reward model card from the scores of held-out answers, and prints it."""

from collections.abc import Iterator, Sequence

import numpy as np
from rich.markup import escape

from perl.backbones.tokens import Tokens
from perl.data.duplicates import Rows
from perl.measure.change import told
from perl.measure.rated_rows import RatedRows
from perl.measure.reward_model_card import RewardModelCard, reward_model_card
from perl.measure.tfidf_baseline import tfidf_scores
from perl.stages.reward_scores import run_member_scores, scores_are_log_odds
from perl.stages.session import Session
from perl.system.progress import console, counted, doing


def evaluate_rows(
    session: Session, rows: Sequence[Tokens], answers: RatedRows, trained_on: RatedRows
) -> RewardModelCard:
    """Compute the card of the run's reward model.

    Args:
        rows: tokens of each answer with its context.
        answers: the answers to evaluate on.
        trained_on: the answers that the model was trained on; the TF-IDF baseline is fitted to them.
    """
    with doing(f"evaluating the reward model on {counted(len(rows), 'answer')}"):
        scores_MN = run_member_scores(session, rows)
    if not np.isfinite(scores_MN).all():
        raise FloatingPointError("the reward model's scores are not finite: lower reward.learning_rate")
    seen = sum(seen_in_training(answers.labelled(), trained_on))
    baseline = tfidf_scores(trained_on.labelled(), answers.labelled())
    return reward_model_card(scores_MN, answers, baseline, seen, scores_are_log_odds(session))


def seen_in_training(answers: RatedRows, trained_on: RatedRows) -> list[bool]:
    """Return for each answer whether its dialogue, or the same or nearly the same row, was trained on."""
    both = [trained_on, answers]
    rows = [(*context, text) for side in both for context, text in zip(side.contexts, side.answers, strict=True)]
    known, count = set(trained_on.dialogues), len(trained_on.answers)
    alike = Rows(rows, [*trained_on.dialogues, *answers.dialogues])
    repeated = alike.like(range(count, len(rows)), range(count))
    return [dialogue in known or one for dialogue, one in zip(answers.dialogues, repeated, strict=True)]


def print_card(title: str, card: RewardModelCard) -> None:
    """Print the verdict and its reasons, in about a dozen lines."""
    verdict = card.verdict
    colour, fit = ("green", "Fit for RL") if verdict.fit else ("red", "Not fit for RL")
    console.print(f"[bold]{escape(title)}[/]: [bold {colour}]{fit}[/].")
    for reason in verdict.reasons:
        console.print(f"  {'+' if verdict.fit else '-'} {reason}", markup=False)
    for line in card_lines(card):
        console.print(f"  {line}", markup=False)


def card_lines(card: RewardModelCard) -> Iterator[str]:
    """Yield the metrics behind the verdict, in sentences."""
    scaled, length, metric = card.calibration, card.length, card.metric
    yield from _ranking(card)
    yield (
        f"Calibration error (ECE) {told(scaled.ece_before)}; with a temperature {told(scaled.ece_temperature)}; "
        f"as σ({scaled.slope:.2f} · {'difference' if card.compared else 'score'} {scaled.intercept:+.2f}) "
        f"{told(scaled.ece_after)}."
    )
    if card.ensemble is not None:
        yield from card.ensemble.words(metric)
    yield (
        f"Length: correlation with the score {told(length.correlation)}; {metric} of length alone "
        f"{told(length.auroc_of_length)}, of the model among similar lengths {told(length.auroc_within)}."
    )
    if judged := [(one.auroc, one) for one in card.slices if one.auroc is not None]:
        value_of_worst, worst = min(judged, key=lambda pair: pair[0])
        words = told(value_of_worst, worst.interval)
        yield f"Weakest slice: {worst.by}, {worst.name} (n = {worst.n:,}): {metric} {words}."
    yield "LoRA and full tuning: not compared (use perl-rlhf compare); worst mistakes: in the report."


def _ranking(card: RewardModelCard) -> Iterator[str]:
    """Yield the quality as a ranking and, except for a model of pairs, as a classifier."""
    intervals = card.intervals
    pairwise = ""
    if card.pairwise_accuracy is not None:
        pairwise = f"pairwise accuracy {told(card.pairwise_accuracy, intervals['pairwise_accuracy'])}"
        pairwise += f", {counted(card.pairs, 'pair')}"
    if card.compared:
        yield f"{pairwise[0].upper()}{pairwise[1:]}."
        return
    against = "the gold judge's verdict" if card.against == "gold" else "the labels"
    if card.auroc is None:
        auroc = f"AUROC cannot be computed: all {card.n:,} answers are rated the same by {against}"
    else:
        auroc = f"AUROC {told(card.auroc, intervals['auroc'])} against {against}"
    if card.auroc_labels is not None:
        auroc += f", {told(card.auroc_labels, intervals['auroc_labels'])} against the labels"
    yield f"{auroc}; {pairwise}." if pairwise else f"{auroc}."
    balanced = told(card.balanced_accuracy, intervals["balanced_accuracy"])
    yield (
        f"Accuracy {told(card.accuracy, intervals['accuracy'])}, always giving the more common label "
        f"{card.majority_accuracy:.2f}; balanced {balanced}."
    )
