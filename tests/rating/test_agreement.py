"""Agreement, against the worked examples in Krippendorff's paper."""

import pytest

from perl.rating.summary import krippendorff_alpha

NOBODY = "."


def test_two_raters_of_two_values() -> None:
    """Computing Krippendorff's Alpha-Reliability (2011), A: binary data, two observers, nothing missing."""
    ann, bo = "0100000010", "1110010000"
    assert krippendorff_alpha(zip(ann, bo, strict=True)) == pytest.approx(0.095, abs=5e-4)


def test_several_raters_who_did_not_rate_everything() -> None:
    """The same, C: nominal data, four observers, values missing."""
    rows = ("123321412...", "1233224125.3", ".33323422 51.".replace(" ", ""), "12332441251.")
    units = [[value for value in unit if value != NOBODY] for unit in zip(*rows, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


@pytest.mark.parametrize("units", [[], [[True]], [[True, True], [True, True]]])
def test_where_nothing_could_differ_it_is_undefined(units: list[list[bool]]) -> None:
    assert krippendorff_alpha(units) is None
