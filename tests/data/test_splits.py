"""Splits: by dialogue and by text across all kinds of rows, reproducible, with both classes on both sides."""

import hashlib
import random
from collections.abc import Sequence

import pytest

from perl.data.records import Comparison, Demonstration, Problem, Prompt, Rating, Records, Turn
from perl.data.splits import split
from perl.errors import UserError

ASK, YES, NO = (Turn("user", "?"),), Turn("agent", "yes"), Turn("agent", "no")


def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    return [1.0 for _ in answers]


def records(dialogues: Sequence[str]) -> Records:
    return Records(
        demonstrations=[Demonstration(ASK, (YES,), key) for key in dialogues],
        ratings=[Rating(ASK, YES if up else NO, up, key) for key in dialogues for up in (True, False)],
        comparisons=[Comparison(ASK, YES, NO, key) for key in dialogues],
        prompts=[Prompt(ASK, key, {"n": n}) for n, key in enumerate(dialogues)],
        problems=[Problem("f:1", "bad")],
        judge=judge,
    )


def keys(side: Records) -> list[set[str]]:
    kinds = (side.demonstrations, side.ratings, side.comparisons, side.prompts)
    return [{record.dialogue for record in kind} for kind in kinds]


def test_every_kind_is_split_by_the_same_dialogues() -> None:
    whole = records([str(n) for n in range(50)])
    train, held = split(whole, held_out=0.2, seed=0)
    held_keys = keys(held)[0]
    assert len(held_keys) == 10
    assert keys(held) == [held_keys] * 4
    assert keys(train) == [{str(n) for n in range(50)} - held_keys] * 4
    assert len(train.ratings) + len(held.ratings) == len(whole.ratings)
    assert train.judge is held.judge is judge
    assert (train.problems, held.problems) == (whole.problems, [])


def test_the_split_depends_on_seed_and_rows_alone() -> None:
    names = [str(n) for n in range(50)]
    held = keys(split(records(names), 0.2, seed=0)[1])[0]
    assert keys(split(records(names[::-1]), 0.2, seed=0)[1])[0] == held
    assert keys(split(records(names), 0.2, seed=1)[1])[0] != held


def test_a_published_test_part_is_held_out_whatever_the_share_and_seed() -> None:
    whole = records([str(n) for n in range(50)])
    whole.published_test = frozenset({"3", "5"})
    for share, seed in ((0.2, 0), (0.9, 1)):
        train, held = split(whole, share, seed)
        assert keys(held) == [{"3", "5"}] * 4
        assert len(keys(train)[0]) == 48


def test_more_data_leaves_most_dialogues_on_their_side() -> None:
    names = [str(n) for n in range(200)]
    before = keys(split(records(names), 0.2, seed=0)[1])[0]
    after = keys(split(records([*names, "new"]), 0.2, seed=0)[1])[0]
    assert len(before ^ after) <= 2


def test_at_least_one_dialogue_is_held_out_and_one_is_not() -> None:
    for share in (0.01, 0.99):
        train, held = split(records(["a", "b"]), share, seed=0)
        assert len(keys(train)[0]) == len(keys(held)[0]) == 1


def test_one_dialogue_cannot_be_split() -> None:
    with pytest.raises(UserError, match="1 dialogue cannot be split"):
        split(records(["a"]), 0.5, seed=0)


@pytest.mark.parametrize("kind", ["demonstrations", "ratings", "comparisons", "prompts"])
def test_what_a_single_dialogue_has_is_trained_on_and_that_is_said(kind: str) -> None:
    whole = records(["a", "b"])
    setattr(whole, kind, [record for record in getattr(whole, kind) if record.dialogue == "a"])
    for seed in range(10):
        train, held = split(whole, 0.5, seed)
        assert (len(getattr(train, kind)) > 0, getattr(held, kind)) == (True, [])
        name = kind if kind != "ratings" else "thumbs down"
        assert any(note.startswith(f"no {name} are held out") for note in held.notes)


def small(count: int, down: int) -> Records:
    """Return ratings of `count` dialogues and their prompts."""
    ratings = [
        Rating((Turn("user", f"Question {n}?"),), Turn("agent", f"Answer {n}."), n >= down, f"d{n}")
        for n in range(count)
    ]
    return Records(ratings=ratings, prompts=[Prompt(rating.context, rating.dialogue) for rating in ratings])


def classes(side: Records) -> set[bool]:
    return {rating.label for rating in side.ratings}


@pytest.mark.parametrize("down", [2, 4])
def test_both_classes_are_on_both_sides_of_few_ratings(down: int) -> None:
    """For 40 ratings with 90 % thumbs up, 75 of 200 seeds used to be refused."""
    for seed in range(200):
        train, held = split(small(40, down), 0.2, seed)
        assert classes(train) == classes(held) == {True, False}
        assert len(held.ratings) == 8 + (down == 2)
        assert sum(not rating.label for rating in held.ratings) == 1
        assert held.notes == []


def test_one_thumb_down_in_all_is_trained_on() -> None:
    for seed in range(20):
        train, held = split(small(40, 1), 0.2, seed)
        assert (classes(train), classes(held), len(held.ratings)) == ({True, False}, {True}, 8)
        assert held.notes == ["no thumbs down are held out: all 1 are in dialogues that are trained on"]


def test_kinds_in_dialogues_of_their_own_are_on_both_sides() -> None:
    """There are two dialogues of each kind among many ratings."""
    whole = small(60, 6)
    whole.demonstrations = [Demonstration((Turn("user", f"Do {n}"),), (YES,), f"s{n}") for n in range(2)]
    whole.comparisons = [Comparison((Turn("user", f"Which {n}"),), YES, NO, f"c{n}") for n in range(2)]
    for seed in range(50):
        train, held = split(whole, 0.2, seed)
        for side in (train, held):
            assert len(side.demonstrations) == len(side.comparisons) == 1
            assert classes(side) == {True, False}


WORDS = [f"word{n}" for n in range(300)]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def drawn(texts: int, rows: int, rows_a_dialogue: int = 1) -> Records:
    """Return ratings sampled with replacement from `texts` different ones, with new dialogue names."""
    draw = random.Random(0)
    different = [
        (text(draw, draw.randint(3, 30)), text(draw, draw.randint(2, 30)), draw.random() < 0.7)
        for _ in range(texts)
    ]
    whole = Records()
    for n in range(rows):
        question, answer, label = draw.choice(different)
        rating = Rating((Turn("user", question),), Turn("agent", answer), label, f"c{n // rows_a_dialogue}")
        whole.ratings.append(rating)
        whole.prompts.append(Prompt(rating.context, rating.dialogue))
    return whole


def seen(train: Records, held: Records) -> int:
    """Return the number of held-out ratings that the training side has word for word."""
    known = {(rating.context, rating.answer) for rating in train.ratings}
    return sum((rating.context, rating.answer) in known for rating in held.ratings)


def test_copies_under_other_names_are_on_one_side() -> None:
    """With splits only by dialogue, 649 of the 1,000 held-out rows were among the 4,000 training rows."""
    train, held = split(drawn(3500, 5000), 0.2, seed=0)
    assert (len(train.ratings), len(held.ratings), seen(train, held)) == (4000, 1000, 0)
    assert not {prompt.context for prompt in train.prompts} & {prompt.context for prompt in held.prompts}
    assert held.notes == []


def test_copies_that_tie_all_dialogues_together_are_left_out_and_that_is_said() -> None:
    """Dialogues have three random rows, so they cannot be separated into groups."""
    train, held = split(drawn(3500, 5000, rows_a_dialogue=3), 0.2, seed=0)
    assert seen(train, held) == 0
    assert len(held.ratings) > 500
    assert "are near-duplicates of training rows, and are left out" in held.notes[0]


def test_where_nothing_would_be_left_copies_stay_and_that_is_said() -> None:
    train, held = split(drawn(20, 400, rows_a_dialogue=3), 0.2, seed=0)
    assert seen(train, held) == len(held.ratings) > 50
    assert held.notes[0].startswith(
        f"{len(held.ratings)} of {len(held.ratings)} held-out ratings are also trained on"
    )


def test_a_greeting_that_most_dialogues_open_with_does_not_make_them_one_group() -> None:
    hello, help_ = Turn("user", "Hello!"), Turn("agent", "Hello. How can I help you?")
    whole, draw = Records(), random.Random(0)
    for n in range(100):
        more = (hello, help_, Turn("user", text(draw, 8)))
        whole.ratings += [Rating((hello,), help_, True, f"d{n}")] if n < 60 else []
        whole.ratings.append(Rating(more, Turn("agent", text(draw, 8)), n % 2 == 0, f"d{n}"))
    train, held = split(whole, 0.2, seed=0)
    assert (len(keys(train)[1]), len(held.ratings), seen(train, held)) == (80, 20, 0)
    assert len(held.notes) == 1


def test_a_published_test_part_is_left_as_it_is() -> None:
    whole = drawn(50, 100)
    whole.published_test = frozenset(f"c{n}" for n in range(30))
    train, held = split(whole, 0.2, seed=0)
    assert (len(train.ratings), len(held.ratings)) == (70, 30)
    assert seen(train, held) > 0


def test_the_simulators_split_hardly_changes(simulated: Records) -> None:
    """It equals the split only by dialogue: the first fifth by hash."""
    train, held = split(simulated, 0.2, seed=0)
    now = set().union(*keys(held))
    names = sorted(now.union(*keys(train)), key=lambda name: hashlib.sha256(f"0:{name}".encode()).digest())
    assert len(now ^ set(names[: round(0.2 * len(names))])) < 0.02 * len(names)
    assert held.notes == []


def test_a_kind_or_class_that_the_whole_lacks_is_not_missed() -> None:
    whole = Records(ratings=[Rating(ASK, YES, True, key) for key in "ab"])
    train, held = split(whole, 0.5, seed=0)
    assert len(train.ratings) == len(held.ratings) == 1
