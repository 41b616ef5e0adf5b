"""Seeding of every global generator, and a seed for each purpose and step."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """Return the seed for a purpose and a step, so that no generator's state must be saved."""
    return random.Random(f"{seed} {purpose} {number}").getrandbits(48)
