"""How RL's learning rate goes over the steps."""

import torch
from transformers import get_scheduler


def learning_rate_shares(name: str, warmup_ratio: float, steps: int) -> list[float]:
    """What each step's rate is of the full one, by transformers' schedule of that name.

    Worked out once and read by the step's number, so that there is no state to save.
    """
    warmup = round(warmup_ratio * steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup + 1, num_training_steps=steps + 1)
    shares = []
    for _ in range(steps):
        optimizer.step()  # without a gradient it changes nothing; a schedule wants to come after it
        schedule.step()
        shares.append(float(schedule.get_last_lr()[0]))
    return shares
