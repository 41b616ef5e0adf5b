"""Splits: by dialogue over all kinds, repeatable, and refused where a side would lack something."""

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


def test_the_split_depends_on_seed_and_dialogues_alone() -> None:
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


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="is not a share"):
        split(records(["a", "b"]), share, seed=0)


def test_one_dialogue_cannot_be_split() -> None:
    with pytest.raises(UserError, match="1 dialogue cannot be split"):
        split(records(["a"]), 0.5, seed=0)


@pytest.mark.parametrize("kind", ["demonstrations", "ratings", "comparisons", "prompts"])
def test_a_side_without_a_kind_that_the_whole_has_is_refused(kind: str) -> None:
    whole = records(["a", "b"])
    setattr(whole, kind, [record for record in getattr(whole, kind) if record.dialogue == "a"])
    with pytest.raises(UserError, match=f"part has no {kind if kind != 'ratings' else 'thumbs up'}, of ") as error:
        split(whole, 0.5, seed=0)
    assert error.value.remedy


def test_a_side_with_one_class_of_ratings_only_is_refused() -> None:
    whole = records(["a", "b"])
    whole.ratings = [rating for rating in whole.ratings if rating.label or rating.dialogue == "a"]
    with pytest.raises(UserError, match="part has no thumbs down, of 1 in all"):
        split(whole, 0.5, seed=0)


def test_a_kind_or_class_that_the_whole_lacks_is_not_missed() -> None:
    whole = Records(ratings=[Rating(ASK, YES, True, key) for key in "ab"])
    train, held = split(whole, 0.5, seed=0)
    assert len(train.ratings) == len(held.ratings) == 1
