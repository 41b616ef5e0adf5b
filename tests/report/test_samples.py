"""Completions side by side: which is better, and which words are marked."""

import pytest

from perl.report.samples import Examples, examples
from perl.results import Completion, Sample


def _sample(before: Completion, after: Completion, role: str = "sft") -> Sample:
    return Sample(prompt="A mocha.", answers={"policy": after, role: before})


def _outcomes(shown: Examples) -> list[str | None]:
    return [one.outcome for one in (*shown.changed, *shown.same)]


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (Completion(text="a", reward=1.0, gold=0.0), Completion(text="b", reward=0.0, gold=1.0), "better"),
        (Completion(text="a", reward=0.0, gold=1.0), Completion(text="b", reward=1.0, gold=0.0), "worse"),
        (Completion(text="a", reward=0.0, gold=1.0), Completion(text="b", reward=1.0, gold=1.0), "alike"),
        (Completion(text="a", reward=0.0), Completion(text="b", reward=1.0), "better"),
        (Completion(text="a", reward=0.0), Completion(text="a", reward=1.0), "same"),
    ],
)
def test_outcome(before: Completion, after: Completion, outcome: str) -> None:
    """The gold judge's verdict takes precedence over the reward; equal texts are equal whatever their scores."""
    assert _outcomes(examples([_sample(before, after)])) == [outcome]


def test_unchanged_come_last() -> None:
    """They are counted with the others and keep the order of the file."""
    same, better = Completion(text="a", reward=0.0), Completion(text="c", reward=2.0)
    shown = examples([_sample(same, same), _sample(same, better), _sample(better, same)])
    assert _outcomes(shown) == ["better", "worse", "same"]
    assert (
        shown.words
        == "After RL compared with before, by the reward that RL raised: 1 better, 1 worse and 1 unchanged."
    )


def test_words_that_differ_are_marked() -> None:
    """Both texts are marked without changing them; texts with nothing in common are not marked."""
    before = Completion(text="One large latte with whole milk.", reward=0.0)
    after = Completion(text="One large latte with oat milk, right?", reward=1.0)
    completions = {one.label: one for one in examples([_sample(before, after)]).changed[0].completions}
    marked = {label: [piece.text for piece in one.pieces if piece.marked] for label, one in completions.items()}
    assert marked == {"After SFT": ["whole milk."], "After RL": ["oat milk, right?"]}
    assert "".join(piece.text for piece in completions["After RL"].pieces) == after.text
    other = Completion(text="Goodbye!", reward=0.0)
    assert not any(
        piece.marked for one in examples([_sample(before, other)]).changed[0].completions for piece in one.pieces
    )


def test_beside_the_base() -> None:
    """Without SFT, RL starts from the base; a policy alone is not compared."""
    old, new = Completion(text="a", reward=0.0), Completion(text="b", reward=1.0)
    assert _outcomes(examples([_sample(old, new, role="base")])) == ["better"]
    alone = examples([Sample(prompt="A mocha.", answers={"policy": new})])
    assert (_outcomes(alone), alone.words) == ([None], "")
