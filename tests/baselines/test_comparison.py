"""Comparison of policies during training, interpolated at a given KL, against numbers worked by hand."""

from perl.baselines.comparison import Point, at_kl


def test_each_prompt_is_interpolated_where_the_kl_is_first_reached() -> None:
    curve = [
        Point(0, {"kl": [0.0, 0.0], "gold": [0.0, 1.0]}),
        Point(2, {"kl": [1.0, 3.0], "gold": [1.0, 1.0]}),  # KL 2
        Point(4, {"kl": [0.5, 0.5], "gold": [0.0, 0.0]}),  # KL 0.5: lower than before
        Point(8, {"kl": [5.0, 3.0], "gold": [1.0, 0.0]}),  # KL 4
    ]
    assert at_kl(curve, 0.0) == curve[0].metrics
    assert at_kl(curve, 0.5) == {"kl": [0.25, 0.75], "gold": [0.25, 1.0]}
    assert at_kl(curve, 2.0) == curve[1].metrics
    assert at_kl(curve, 2.25) == {"kl": [2.75, 1.75], "gold": [0.5, 0.0]}
    assert at_kl(curve, 4.0) == curve[3].metrics
