"""Fits the TF-IDF that is blended with a reward model's scores, and the scales that give both equal weight.

TF-IDF with logistic regression is fitted to the training rows. Each part's spread is measured on the validation
rows, whose dialogues neither has seen: on rows that it has memorised, a model is far too confident. Then TF-IDF is
fitted again, on all rows.

Letters: N rows, V vocabulary; the leading 2 are the context and the answer.
"""

from typing import Any

import numpy as np
import torch

from perl.measure.bootstrap import Floats
from perl.measure.calibration import predictions
from perl.measure.tfidf_baseline import MAX_TRAINING_ROWS
from perl.results import Blend
from perl.rl.rewards.model import score_rows
from perl.roles.role import Role
from perl.roles.score_terms import ScoreTerms, TfidfBlend
from perl.stages.reward_rows import Rows
from perl.stages.session import Session

LEAST_SPREAD = 1e-3
"""Log-odds with a smaller spread carry no information and are not scaled up."""
MODEL_ONLY, WORDS_ONLY = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def fit_tfidf(session: Session, role: Role, train: Rows, validation: Rows, everything: Rows) -> Blend:
    """Fit a trained member's blend; return its coefficients.

    Args:
        everything: the training and validation rows.
    """
    terms = session.roles.score_terms[role]
    assert isinstance(terms, ScoreTerms)
    blend = terms["tfidf"]
    assert isinstance(blend, TfidfBlend)

    def scores(mix: tuple[float, float, float]) -> Floats:
        blend.mix_3.copy_(torch.tensor(mix))
        found: Floats = score_rows(session.roles, [role], validation.tokens, session.base.chat.pad_id)[0].numpy()
        return found

    fit_words(blend, train)
    mix = fit_mix(scores(MODEL_ONLY), scores(WORDS_ONLY), validation)
    fit_words(blend, everything)
    blend.mix_3.copy_(torch.tensor([mix.model, mix.words, mix.intercept]))
    return mix


def fit_words(blend: TfidfBlend, rows: Rows) -> None:
    """Fit TF-IDF of context and answer, each of unit norm, and logistic regression with balanced classes."""
    from scipy.sparse import hstack  # scikit-learn takes 2 s to import
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    count = len(rows.labels)
    chosen = slice(0, count, -(-count // MAX_TRAINING_ROWS))
    labels, tokens = rows.labels[chosen], rows.tokens[chosen]
    vocabulary = blend.idf_2V.shape[1]
    contexts = _counts([row.ids[: row.prompt_length()] for row in tokens], vocabulary)
    answers = _counts([row.ids[row.prompt_length() :] for row in tokens], vocabulary)
    features, idfs = [], []
    for counts in (contexts, answers):
        tfidf = TfidfTransformer().fit(counts)
        features.append(tfidf.transform(counts))
        # Tokens that were never seen are left out, also from the norm.
        idfs.append(np.where(counts.sum(0).A1 > 0, tfidf.idf_, 0.0))
    fitted = LogisticRegression(max_iter=1000, class_weight="balanced").fit(hstack(features), labels)
    blend.idf_2V.copy_(torch.from_numpy(np.stack(idfs)))
    blend.weights_2V.copy_(torch.from_numpy(fitted.coef_.reshape(2, vocabulary)))


def _counts(texts: list[list[int]], vocabulary: int) -> Any:
    """Return how often each token occurs in each text, as a sparse matrix N x V."""
    from scipy.sparse import csr_matrix

    texts = [[token for token in text if token >= 0] for text in texts]  # negative: a decoder's start
    columns = [token for text in texts for token in text]
    rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    return csr_matrix((np.ones(len(columns)), (rows, columns)), shape=(len(texts), vocabulary))


def fit_mix(model_N: Floats, words_N: Floats, rows: Rows) -> Blend:
    """Return coefficients of the sum of the model's scores and TF-IDF's log-odds, each divided by its spread.

    Both have equal weight: a few hundred rows of a few dozen dialogues do not show which is better, and weights
    fitted to them rank worse on other dialogues (docs/experiments.md). Slope and intercept turn the sum into
    log-odds, by logistic regression with balanced classes, which the reward model's training uses too.
    """
    from sklearn.linear_model import LogisticRegression

    labelled = rows.labelled()
    given = [predictions(scores[: len(rows.labels)], labelled) for scores in (model_N, words_N)]
    compared, labels = given[0].compared, given[0].labels
    # For pairs the scores are differences; their negatives are added so that there are both classes.
    spreads = (float(np.sqrt(np.mean(one.scores**2)) if compared else one.scores.std()) for one in given)
    model, words = (spread if spread > LEAST_SPREAD else 1.0 for spread in spreads)
    both_N = given[0].scores / model + given[1].scores / words
    if compared:
        both_N, labels = np.concatenate([both_N, -both_N]), np.concatenate([labels, 1 - labels])
    fitted = LogisticRegression(class_weight="balanced", fit_intercept=not compared).fit(both_N[:, None], labels)
    slope, intercept = float(fitted.coef_[0, 0]), float(np.ravel(fitted.intercept_)[0])
    if slope <= 0:  # so few rows must not reverse the ranking
        slope, intercept = 1.0, 0.0
    return Blend(model=slope / model, words=slope / words, intercept=intercept, rows=len(given[0].labels))
