"""Groups with equal rewards are replaced by groups of further rollouts."""

from dataclasses import replace

import torch

from perl.rl.dynamic_sampling import assembled, differing, joined
from tests.rl.rollouts import rollout


def test_groups_that_differ_come_first_and_equal_ones_fill_up() -> None:
    first = rollout(rewards_B=torch.tensor([1.0, 1.0, 2.0, 3.0]), texts=["a", "b", "c", "d"])
    second = rollout(rewards_B=torch.tensor([5.0, 6.0, 0.0, 0.0]), texts=["e", "f", "g", "h"])
    found = assembled([first, second], 4)
    assert found.texts == ["c", "d", "e", "f"]
    assert found.groups == [1, 1, 2, 2]
    assert found.group_size == 2
    assert assembled([first, first], 4).texts == ["c", "d", "c", "d"]
    equal = replace(second, rewards_B=torch.zeros(4))
    assert assembled([first, equal], 4).texts == ["c", "d", "a", "b"]


def test_groups_differ_whatever_the_scale_of_rewards() -> None:
    for scale in (1e-9, 1.0, 1e9):
        rewards_B = scale * torch.tensor([1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
        assert differing(rollout(rewards_B=rewards_B)).tolist() == [False, False, True, True]
    assert not differing(rollout(rewards_B=torch.zeros(4))).any()


def test_prompts_of_other_lengths_are_padded_on_the_left() -> None:
    short, long = rollout(), rollout().widened(5)
    both = joined([short, long])
    assert both.ids_BL.shape == both.mask_BL.shape == (8, 5)
    assert torch.equal(both.mask_BL[:4], both.mask_BL[4:])
    assert torch.equal(both.completion_mask_BT[:4], short.completion_mask_BT)
