"""The floor: what counting words can do. A reward model that does no better has not been shown to read."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from perl.measure.answers import Answers
from perl.measure.bootstrap import Floats

CONTEXT_CHARACTERS = 400
"""The end of the context is what an answer answers."""
FLOOR_ROWS = 20_000
"""Training rows at most, evenly spaced: the floor is to take seconds."""


@dataclass(frozen=True)
class Floor:
    """The floor's scores of the held-out answers, and how many of the training rows it learned from."""

    scores: Floats
    rows: int
    of_rows: int


def tfidf_floor(train: Answers, held_out: Answers) -> Floor:
    """TF-IDF of the context's end and of the answer, each apart, and logistic regression with balanced classes."""
    step = -(-len(train.labels) // FLOOR_ROWS)
    texts, labels = _texts(train)[::step], train.labels[::step]
    words = make_column_transformer((TfidfVectorizer(analyzer=_words), 0), (TfidfVectorizer(analyzer=_words), 1))
    model = make_pipeline(words, LogisticRegression(max_iter=1000, class_weight="balanced"))
    model.fit(texts, labels)
    return Floor(model.decision_function(_texts(held_out)), len(labels), len(train.labels))


def _texts(answers: Answers) -> NDArray[np.object_]:
    """N x 2: the context's end, the answer."""
    ends = [" ".join(turn.text for turn in context)[-CONTEXT_CHARACTERS:] for context in answers.contexts]
    return np.array([ends, [turn.text for turn in answers.answers]], dtype=object).T


def _words(text: str) -> list[str]:
    """Words of two letters and more, as scikit-learn finds them; a text without any is a word of its own."""
    return re.findall(r"\w\w+", text.lower()) or [""]
