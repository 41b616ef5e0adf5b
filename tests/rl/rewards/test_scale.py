"""Running statistics of rewards: those of all rewards so far, at any scale."""

import json

import numpy as np
import pytest
import torch

from perl.rl.rewards.scale import RewardScale
from perl.system.typed_json import as_json, made


def rollouts(scale: float = 1.0, shift: float = 0.0) -> list[torch.Tensor]:
    random = np.random.default_rng(0)
    return [torch.from_numpy(shift + scale * random.normal(size=size)) for size in (4, 16, 7)]


def test_mean_and_spread_are_those_of_all_rewards_so_far() -> None:
    scale = RewardScale()
    for rewards_B in rollouts():
        scale.update(rewards_B)
    every = torch.cat(rollouts()).numpy()
    assert (scale.count, scale.mean) == (27, pytest.approx(every.mean()))
    assert scale.std == pytest.approx(every.std())


@pytest.mark.parametrize(("factor", "shift"), [(0.01, 0.0), (100.0, 0.0), (1.0, 1000.0), (1e-4, -3.0)])
def test_scale_and_shift_change_nothing_but_rounding(factor: float, shift: float) -> None:
    one, other = RewardScale(), RewardScale()
    for plain_B, changed_B in zip(rollouts(), rollouts(factor, shift), strict=True):
        one.update(plain_B)
        other.update(changed_B)
        torch.testing.assert_close(one.normalized(plain_B), other.normalized(changed_B), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2, -1e6])
def test_equal_rewards_are_normalised_to_zero(value: float) -> None:
    scale = RewardScale()
    rewards_B = torch.full((8,), value, dtype=torch.float64)
    rewards_B[0] *= 1 + 1e-12  # rounding is not a spread
    scale.update(rewards_B)
    assert scale.std == 0.0
    assert scale.normalized(rewards_B).tolist() == [0.0] * 8


def test_an_absurd_reward_does_not_make_all_others_equal() -> None:
    """At the start the median distance from the median detects it, later the spread so far."""
    first, *rest = rollouts()
    for absurd in (first, *rest):
        absurd[2] = 1e9
    scale = RewardScale()
    for rewards_B in (first, *rest):
        within_B = scale.within(rewards_B)
        scale.update(within_B)
        others_B = scale.normalized(within_B)[torch.arange(len(rewards_B)) != 2]
        assert others_B.std() > 0.1
        assert scale.normalized(within_B)[2] == scale.normalized(within_B).max()


def test_a_rare_reward_counts_as_far_and_whole_once_it_is_not_rare() -> None:
    scale, random = RewardScale(), np.random.default_rng(0)
    for share in (0.002, 0.5):
        for _ in range(200):
            rewards_B = torch.from_numpy((random.random(16) < share).astype(float))
            assert scale.absurd(rewards_B) is None
            scale.update(scale.within(rewards_B))
        counts = float(scale.normalized(scale.within(torch.tensor([1.0]))))
        assert counts == pytest.approx(10.0) if share < 0.01 else 1.0 < counts < 2.0
    assert scale.within(torch.tensor([1.0])).tolist() == [1.0]


def test_rewards_that_are_mostly_equal_do_not_say_how_far_is_far() -> None:
    assert RewardScale().within(torch.tensor([0.0] * 15 + [1.0])).tolist() == [0.0] * 15 + [1.0]


def test_two_levels_with_a_small_difference_within_them_are_no_outliers() -> None:
    """Rewards are right or wrong plus a tie-break, and the median distance reflects only the tie-break."""
    scale, random = RewardScale(), np.random.default_rng(0)
    for _ in range(4):
        rewards_B = torch.from_numpy((random.random(16) < 0.3) + 1e-4 * random.standard_normal(16))
        assert scale.absurd(rewards_B) is None
        scale.update(scale.within(rewards_B))
        assert scale.std == pytest.approx(0.46, rel=0.3)
    # A single one in the first rollout is one.
    first_B = torch.tensor([0.0, 0.1, 0.2, 0.1, 0.3, 0.2, 0.1, 0.0, 1e6])
    assert float(RewardScale().within(first_B).max()) < 10


def test_an_absurd_reward_is_named() -> None:
    scale = RewardScale()
    first, second, _ = rollouts()
    assert scale.absurd(first) is None
    scale.update(first)
    second[5] = -1e9
    assert scale.absurd(second) == -1e9


def test_it_goes_on_from_its_state() -> None:
    scale = RewardScale()
    first, *rest = rollouts()
    scale.update(first)
    again = made(RewardScale, json.loads(json.dumps(as_json(scale))))
    for rewards_B in rest:
        scale.update(rewards_B)
        again.update(rewards_B)
    assert again == scale
