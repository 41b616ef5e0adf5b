"""Learning rates: what `auto` comes to, and how a rate goes over the steps."""

import pytest

from perl.rl.schedule import auto_head_learning_rate, auto_learning_rate, learning_rate_shares


def test_auto_falls_with_width_and_epochs_and_full_tuning_gets_a_tenth() -> None:
    assert auto_learning_rate(128, "lora", 1) == 4e-3
    assert auto_learning_rate(4096, "lora", 1) == pytest.approx(2.5e-4, rel=0.05)
    assert auto_learning_rate(4096, "lora", 4) == pytest.approx(2.5e-4 / 4, rel=0.05)
    assert auto_learning_rate(4096, "full", 1) == pytest.approx(2.5e-5, rel=0.05)
    one = auto_head_learning_rate(128, 0.4)
    assert one == pytest.approx(32 * auto_head_learning_rate(4096, 0.4), rel=0.05)
    assert one == pytest.approx(50 * auto_head_learning_rate(128, 20.0), rel=0.05)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 7, 60, 1000])
def test_warmup_is_a_share_of_the_steps(name: str, steps: int) -> None:
    """The first step of a run of any length learns, and the rate is full after a tenth of it."""
    shares = learning_rate_shares(name, 0.1, steps)
    full = round(0.1 * steps)
    assert len(shares) == steps
    assert shares[0] > 0
    assert shares[full] == 1.0
    assert shares[: full + 1] == sorted(shares[: full + 1])


def test_the_ends_of_the_schedules() -> None:
    assert learning_rate_shares("constant", 0.0, 10)[-1] == 1.0
    assert learning_rate_shares("linear", 0.0, 10)[-1] == pytest.approx(0.1)
    assert 0 < learning_rate_shares("cosine", 0.0, 10)[-1] < 0.05
