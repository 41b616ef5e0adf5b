"""Synthetic rated answers: 85 % thumbs up, with a preference for longer answers and for certain words."""

from dataclasses import dataclass, replace

import numpy as np

from perl.data.records import Turn
from perl.measure.bootstrap import Floats
from perl.measure.rated_rows import RatedRows

ANSWERS_A_DIALOGUE = 4


@dataclass(frozen=True)
class Made:
    """Training and held-out answers, with each held-out answer's true quality in standard deviations."""

    train: RatedRows
    held_out: RatedRows
    quality: Floats


def made(seed: int = 0, dialogues: int = 250, up: float = 0.85, length_matters: float = 1.0) -> Made:
    """Make `dialogues` dialogues for training and as many held out, with four answers each."""
    random = np.random.default_rng(seed)
    train, _ = _answers(random, dialogues, up, length_matters)
    return Made(train, *_answers(random, dialogues, up, length_matters))


def _answers(
    random: np.random.Generator, dialogues: int, up: float, length_matters: float
) -> tuple[RatedRows, Floats]:
    count = dialogues * ANSWERS_A_DIALOGUE
    quality = random.normal(size=count)
    noisy = quality + 0.7 * random.normal(size=count)
    words = 4 + random.poisson(np.clip(6 + 2 * length_matters * noisy, 1, None))
    texts = []
    for length, good in zip(words, quality, strict=True):
        liked = random.random(length) < 0.35 + 0.03 * good
        texts.append(" ".join(f"{'fine' if one else 'so'}{random.integers(20)}" for one in liked))
    names = [f"d{random.integers(10**9)}-{index // ANSWERS_A_DIALOGUE}" for index in range(0, count, 4)]
    of = [names[index // ANSWERS_A_DIALOGUE] for index in range(count)]
    answers = RatedRows(
        contexts=[
            (Turn("user", f"hello {name}"), *([Turn("agent", "go on"), Turn("user", "ok")] * (index % 4)))
            for index, name in enumerate(of)
        ],
        answers=[Turn("agent", f"call {text}" if index % 5 == 0 else text) for index, text in enumerate(texts)],
        dialogues=of,
        sources=["shop" if index % 3 else "cinema" for index in range(count)],
        labels=(noisy > np.quantile(noisy, 1 - up)).tolist(),
        gold=None,
        pairs=[],
    )
    return answers, quality


def shuffled(answers: RatedRows, seed: int = 0) -> RatedRows:
    """Return the same answers with shuffled labels."""
    labels = np.random.default_rng(seed).permutation(answers.labels).tolist()
    return replace(answers, labels=labels)


def lengths(answers: RatedRows) -> Floats:
    """Return the answers' lengths in characters."""
    return np.array([len(answer.text) for answer in answers.answers], dtype=np.float64)
