"""Answer checking, against values worked by hand and the published sets."""

import pytest

from perl.data.answers import AnswerKind, check_references, first_letter, is_right, last_number
from perl.data.records import JSON, Prompt, Turn
from perl.errors import UserError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7 + 5 = 12. The answer is 12.", 12),
        ("It costs $1,234.50 in all", 1234.5),
        ("from 3 to -4", -4),
        ("none", None),
        ("5-3", -3),  # as published: a sign before a digit belongs to it
    ],
)
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_the_first_letter_stands_anywhere() -> None:
    assert first_letter("the answer is (D), not A") == "D"
    assert first_letter("Because") == "B"
    assert first_letter("no choice") is None


@pytest.mark.parametrize(
    ("kind", "text", "reference", "right"),
    [
        ("number", "so 8", "8.0", True),
        ("number", "so 8.0009", 8, True),
        ("number", "so 8.01", 8, False),
        ("number", "1,000", "1,000", True),
        ("number", "", "8", False),
        ("letter", "(B)", "B", True),
        ("letter", "(C)", "B", False),
        ("letter", "(B)", "B,", True),
    ],
)
def test_right_and_wrong(kind: AnswerKind, text: str, reference: JSON, right: bool) -> None:
    assert is_right(kind, text, reference) is right


def test_latex_is_compared_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    assert is_right("latex", r"so it is \boxed{\frac{1}{2}}", "0.5")
    assert is_right("latex", r"$x = 2\sqrt{2}$", r"\sqrt{8}")
    assert not is_right("latex", r"$\frac{1}{3}$", r"\frac{1}{2}")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "it has no column 'answer'"),
        ({"answer": "many"}, "its column 'answer' is not a number"),
        ({"answer": True}, "is neither text nor a number"),
        ({"answer": "nan"}, "is not finite"),
    ],
)
def test_a_reference_that_cannot_be_used_is_named(columns: dict[str, JSON], says: str) -> None:
    good = Prompt((Turn("user", "1 + 1?"),), "good", {"answer": 2})
    with pytest.raises(UserError) as error:
        check_references("number", "answer", [good, Prompt(good.context, "bad", columns)], "rl.reward math")
    assert says in str(error.value)
    assert "'bad'" in str(error.value)
