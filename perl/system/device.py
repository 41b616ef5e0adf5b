"""A GPU computes while the host goes on, which waits where it asks for a value or copies as torch does unasked."""

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device) -> Tensor:
    """A tensor of these numbers on a device, without waiting for what the device still computes."""
    return torch.tensor(values).to(device, non_blocking=True)
