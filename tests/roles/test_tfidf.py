"""Scores blended with TF-IDF of the tokens, against scikit-learn's pipeline."""

import numpy as np
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from perl.backbones.tokens import Tokens
from perl.data.records import Turn
from perl.measure.bootstrap import Floats
from perl.measure.calibration import fit, predictions
from perl.measure.metrics import Labels
from perl.rl.rewards.model import score_rows
from perl.roles.role import Role
from perl.roles.score_terms import ScoreTerms, TfidfBlend
from perl.roles.shared_base import SharedBase
from perl.stages.reward_rows import Rows
from perl.stages.reward_tfidf import fit_mix, fit_words
from tests.tiny import lora, random_llama

NEW = [Tokens.joined([5, 6, 7, 7], [8, 9, 8]), Tokens.joined([5], [199]), Tokens.joined([198, 5], [10, 11, 12])]
"""In the second row no token of the answer is known, in the third one of the context's."""


def rated(tokens: list[Tokens], labels: list[bool], pairs: list[tuple[int, int]] | None = None) -> Rows:
    count = len(labels)
    return Rows(
        contexts=[(Turn("user", str(number)),) for number in range(count)],
        answers=[Turn("assistant", "")] * count,
        dialogues=[str(number) for number in range(count)],
        sources=["rows"] * count,
        labels=labels,
        gold=None,
        pairs=pairs or [],
        tokens=tokens,
        targets=[float(label) for label in labels],
        margins=[],
    )


def training_rows(seed: int = 0) -> Rows:
    """Return rows in which answers with token 9 are mostly good, and those to contexts with token 6 mostly bad."""
    generator = np.random.default_rng(seed)
    tokens, labels = [], []
    for _ in range(120):
        context, answer = (generator.integers(5, 15, generator.integers(1, 7)).tolist() for _ in range(2))
        tokens.append(Tokens.joined(context, answer))
        labels.append(bool(generator.random() < 0.5 + 0.4 * (9 in answer) - 0.4 * (6 in context)))
    return rated(tokens, labels)


def by_scikit_learn(train: Rows, rows: list[Tokens]) -> list[float]:
    """Return log-odds of a pipeline with token ids as words."""

    def texts(of: list[Tokens]) -> np.ndarray:
        halves = [(one.ids[: one.prompt_length()], one.ids[one.prompt_length() :]) for one in of]
        return np.array([[" ".join(map(str, half)) for half in pair] for pair in halves], dtype=object)

    words = make_column_transformer(
        (TfidfVectorizer(analyzer=str.split), 0), (TfidfVectorizer(analyzer=str.split), 1)
    )
    model = make_pipeline(words, LogisticRegression(max_iter=1000, class_weight="balanced"))
    model.fit(texts(train.tokens), train.labels)
    return (model.decision_function(texts(rows)) - model[-1].intercept_[0]).tolist()


@pytest.fixture
def roles() -> SharedBase:
    roles = SharedBase(lora(random_llama(), 4, 8))
    roles.asked_score_terms = ("tfidf",)
    roles.add(Role.REWARD, head=True)
    generator = torch.Generator().manual_seed(1)
    for weight in roles.parameters_of(Role.REWARD):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return roles.eval()


def blend_of(roles: SharedBase) -> TfidfBlend:
    terms = roles.score_terms[Role.REWARD]
    assert isinstance(terms, ScoreTerms)
    blend = terms["tfidf"]
    assert isinstance(blend, TfidfBlend)
    return blend


def test_words_score_as_scikit_learns_pipeline(roles: SharedBase) -> None:
    train, blend = training_rows(), blend_of(roles)
    alone = score_rows(roles, [Role.REWARD], NEW, 0)[0]
    fit_words(blend, train)
    torch.testing.assert_close(score_rows(roles, [Role.REWARD], NEW, 0)[0], alone)  # until the mixture is known
    blend.mix_3.copy_(torch.tensor([0.0, 1.0, 0.0]))
    expected = by_scikit_learn(train, NEW)
    assert len({round(one, 3) for one in expected}) == 3
    for at_once in (1, 3):  # alone, and padded
        assert score_rows(roles, [Role.REWARD], NEW, 0, at_once)[0].tolist() == pytest.approx(expected, abs=1e-4)
    blend.mix_3.copy_(torch.tensor([2.0, 3.0, -1.0]))
    blended = [2 * one + 3 * other - 1 for one, other in zip(alone.tolist(), expected, strict=True)]
    assert score_rows(roles, [Role.REWARD], NEW, 0)[0].tolist() == pytest.approx(blended, abs=1e-4)


def test_nothing_of_the_blend_is_trained_by_gradients(roles: SharedBase) -> None:
    trained = {id(one) for one in roles.train_only(Role.REWARD)}
    assert not trained & {id(one) for one in blend_of(roles).buffers()}
    assert list(roles.head_weights(Role.REWARD)) == ["score.weight"]


@pytest.mark.parametrize("compared", [False, True])
def test_model_and_words_count_alike_whatever_their_scales(compared: bool) -> None:
    generator = np.random.default_rng(0)
    labels = [True] * 200 + [False] * 200
    pairs = [(one, 200 + one) for one in range(200)] if compared else None
    rows = rated([Tokens.joined([5], [6])] * 400, labels, pairs)
    truth = np.array(labels) - 0.5
    model, words = truth + generator.normal(size=400), truth + 3 * generator.normal(size=400)
    mix, scaled = fit_mix(model, words, rows), fit_mix(100 * model, 0.01 * words, rows)
    assert scaled.model * 100 == pytest.approx(mix.model)
    assert scaled.words * 0.01 == pytest.approx(mix.words)
    spread = [(one[:200] - one[200:]) if compared else one - one.mean() for one in (model, words)]
    of_model, of_words = (np.sqrt(np.mean(one**2)) for one in spread)
    assert mix.model * of_model == pytest.approx(mix.words * of_words)
    # As log-odds they are of the size that the labels bear out: fitted again, the slope is 1.
    blended = mix.model * model + mix.words * words + mix.intercept
    assert fit(*_given(blended, rows), intercept=not compared).slope == pytest.approx(1, abs=0.05)
    # Rows that would turn the ranking around leave it as it is.
    assert fit_mix(-model, -words, rows).model > 0


def _given(scores: Floats, rows: Rows) -> tuple[Floats, Labels]:
    found = predictions(scores, rows)
    return found.scores, found.labels
