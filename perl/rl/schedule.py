"""Learning rates of RL: what `auto` means, and how a rate goes over the steps."""

import torch
from transformers import get_scheduler

ADAPTER_RATE, ADAPTER_WIDTH = 4e-3, 128
"""A rate that was measured, for one update a rollout, and the width of the model that it was measured on."""
WIDTH_POWER = 0.8
"""How the best rate falls with width: Schulman et al. 2025 (LoRA Without Regret, thinkingmachines.ai/blog/lora)
fit 0.781 for Llama models."""
FULL_SHARE = 0.1
"""Full tuning learns best at about a tenth of LoRA's rate (ibid.)."""
HEAD_STEP = 0.2
"""By how much one update of Adam may move a value, in standard deviations of the reward.

It moves each weight by the rate at most, so a value by rate × width × mean |hidden state|. Measured on returns of
TinyStories-656K: a linear head's best explained variance is 0.11; this reached 0.09 in 30 steps, a quarter of it
0.03, four times it 0.05."""


def auto_learning_rate(width: int, tuning: str, epochs: int) -> float:
    """The rate of adapters, or of whole models under full tuning, for a base of this hidden size.

    The updates from one rollout share the way that a step goes.
    """
    rate = ADAPTER_RATE * (ADAPTER_WIDTH / width) ** WIDTH_POWER / epochs
    return float(f"{rate * (FULL_SHARE if tuning == 'full' else 1.0):.2g}")


def auto_head_learning_rate(width: int, size: float) -> float:
    """The rate of a linear head that begins at zero, on hidden states of this width and mean absolute value."""
    return float(f"{HEAD_STEP / (width * size):.2g}")


def learning_rate_shares(name: str, warmup_ratio: float, steps: int) -> list[float]:
    """What each step's rate is of the full one, by transformers' schedule of that name.

    Worked out once and read by the step's number, so that there is no state to save.
    """
    warmup = round(warmup_ratio * steps)
    name = "constant_with_warmup" if name == "constant" else name
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup + 1, num_training_steps=steps + 1)
    shares = []
    for _ in range(steps):
        optimizer.step()  # without a gradient it changes nothing; a schedule wants to come after it
        schedule.step()
        shares.append(float(schedule.get_last_lr()[0]))
    return shares
