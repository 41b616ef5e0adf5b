"""The baseline of a reward model: TF-IDF with logistic regression."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perl.measure.bootstrap import ClusterBootstrap, Floats, Interval, Statistic
from perl.measure.metrics import Labels, auroc, pairwise_accuracy
from perl.measure.rated_rows import RatedRows

CONTEXT_CHARACTERS = 400
"""Number of characters that are read at the end of the context."""
MAX_TRAINING_ROWS = 20_000
"""Training rows are subsampled evenly to this number, so that training takes seconds."""

_SINGLE = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\u2600-\u27bf\u2b00-\u2bff\U0001f300-\U0001faff"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese characters, and emoji."""
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]{{2,}}")


@dataclass(frozen=True)
class TfidfScores:
    """The baseline's scores of held-out completions, and how many of the training rows it was trained on."""

    scores: Floats
    rows: int
    of_rows: int


@dataclass(frozen=True, kw_only=True)
class TfidfBaseline:
    """The baseline's pairwise accuracy (for compared completions) or AUROC, and the model's lead over it."""

    metric: Literal["auroc", "pairwise_accuracy"]
    value: float | None
    value_interval: Interval | None
    ahead: float | None
    ahead_interval: Interval | None
    rows: int
    of_rows: int


def tfidf_scores(train: RatedRows, held_out: RatedRows) -> TfidfScores:
    """Fit separate TF-IDF features of context end and completion, and a class-balanced logistic regression."""
    # scikit-learn takes 2 s to import and is not needed to read a card
    from sklearn.compose import make_column_transformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    step = -(-len(train.labels) // MAX_TRAINING_ROWS)
    texts, labels = _texts(train)[::step], train.labels[::step]
    words = make_column_transformer((TfidfVectorizer(analyzer=_words), 0), (TfidfVectorizer(analyzer=_words), 1))
    model = make_pipeline(words, LogisticRegression(max_iter=1000, class_weight="balanced"))
    model.fit(texts, labels)
    return TfidfScores(model.decision_function(_texts(held_out)), len(labels), len(train.labels))


def _texts(rows: RatedRows) -> NDArray[np.object_]:
    """Return N x 2: the end of the context, the completion."""
    ends = [" ".join(turn.text for turn in context)[-CONTEXT_CHARACTERS:] for context in rows.contexts]
    return np.array([ends, [turn.text for turn in rows.answers]], dtype=object).T


def _words(text: str) -> list[str]:
    """Return words of two letters or more, as in scikit-learn; [""] for a text without any.

    In scripts without spaces between words each character is a word, and so is each emoji. As whole sentences,
    words would be useless, and any model would be ahead of the baseline.
    """
    return _WORD.findall(text.lower()) or [""]


def tfidf_baseline(
    scores: Floats, rows: RatedRows, baseline: TfidfScores, truth: Labels, bootstrap: ClusterBootstrap
) -> TfidfBaseline:
    """Compare the baseline with a model's scores of the same rows; the difference's interval is paired."""

    def ranking(of: Floats) -> Statistic:
        return pairwise_accuracy(of, rows.pairs) if rows.compared else auroc(of, truth)

    of_model, of_words = ranking(scores), ranking(baseline.scores)
    alone = bootstrap.estimate(of_words)
    ahead = bootstrap.estimate(lambda weights_SN: of_model(weights_SN) - of_words(weights_SN))
    return TfidfBaseline(
        metric="pairwise_accuracy" if rows.compared else "auroc",
        value=alone.value,
        value_interval=alone.interval,
        ahead=ahead.value,
        ahead_interval=ahead.interval,
        rows=baseline.rows,
        of_rows=baseline.of_rows,
    )
