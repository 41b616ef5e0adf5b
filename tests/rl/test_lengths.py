"""Length rewards and penalties, worked by hand from the papers' formulas."""

import pytest
import torch

from perl.rl.objective import length_reward, overlong_penalty


def test_kimis_length_reward() -> None:
    """Groups with lengths 2, 4, 6 and 5, 5, 5: λ is 0.5, 0 and -0.5, and 0 where all lengths are equal."""
    lengths_B = torch.tensor([2, 4, 6, 5, 5, 5])
    right_B = torch.ones(6).bool()
    assert length_reward(lengths_B, right_B, 3).tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]
    assert length_reward(lengths_B, ~right_B, 3).tolist() == [0.0, 0.0, -0.5, 0.0, 0.0, 0.0]


def test_dapos_ramp() -> None:
    """L_max 20 and a buffer of 4: no penalty up to 16 tokens, then a quarter per token."""
    assert overlong_penalty(torch.tensor([1, 16, 17, 19, 20]), 20, 4).tolist() == pytest.approx(
        [0.0, 0.0, -0.25, -0.75, -1.0], abs=1e-6
    )
