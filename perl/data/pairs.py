"""Ratings of the same context: repeats, contradictions, and the preference pairs they yield."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import product

from perl.data.records import Comparison, Context, Rating, Records, Turn


def labels_by_answer(ratings: Iterable[Rating]) -> dict[tuple[Context, Turn], set[bool]]:
    """Return the labels of each (context, answer): two if raters contradict each other."""
    labels: dict[tuple[Context, Turn], set[bool]] = defaultdict(set)
    for rating in ratings:
        labels[rating.context, rating.answer].add(rating.label)
    return dict(labels)


def without_repeats(ratings: Iterable[Rating]) -> list[Rating]:
    """Return the first rating of each (context, answer), and none of those with both labels."""
    ratings = list(ratings)
    labels = labels_by_answer(ratings)
    first = {(rating.context, rating.answer): rating for rating in reversed(ratings)}
    return [first[key] for key, values in labels.items() if len(values) == 1]


def pair_ratings(ratings: Iterable[Rating], at_most: int = 4) -> list[Comparison]:
    """Return comparisons from contexts with both an up and a down answer: each up × each down.

    Args:
        ratings: ratings in any order; repeats count once, answers with both labels not at all.
        at_most: pairs per context, so that none outweighs the others; they use as many answers as possible.
    """
    by_context: dict[Context, list[Rating]] = defaultdict(list)
    for rating in without_repeats(ratings):
        by_context[rating.context].append(rating)
    comparisons = []
    for context, rated in by_context.items():
        ups, downs = ([rating for rating in rated if rating.label == label] for label in (True, False))
        # The diagonal first, so that the first pairs share no answer if possible.
        count = max(len(ups), len(downs))
        pairs = sorted(product(range(len(ups)), range(len(downs))), key=lambda pair: (pair[1] - pair[0]) % count)
        for up, down in pairs[:at_most]:
            comparisons.append(Comparison(context, ups[up].answer, downs[down].answer, ups[up].dialogue))
    return comparisons


def to_compare(records: Records, loss: str) -> list[Comparison]:
    """Return the comparisons that a reward model with this loss learns from, or those of the data for `any`."""
    if loss in ("pairs", "both"):
        return records.comparisons or pair_ratings(records.ratings)
    return [] if loss == "thumbs" and records.ratings else records.comparisons
