"""The schedule of RL's learning rate."""

import pytest

from perl.rl.update import learning_rate_shares


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("steps", [1, 7, 60, 1000])
def test_warmup_is_a_share_of_the_steps(name: str, steps: int) -> None:
    """The first step's rate is above zero for any number of steps, and the rate is full after a tenth of them."""
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
