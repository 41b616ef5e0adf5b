"""The compute device: its name, tensors for it, and the dtypes in which it is slow."""

import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SLOW = 2.0
"""A dtype counts as slow if fp32 is at least this many times faster on this CPU."""


def to_device(values: Any, device: torch.device) -> Tensor:
    """Return a tensor of these numbers on a device, without waiting for pending work of the device.

    A GPU computes asynchronously; the host waits for it when it reads a value or makes one of torch's default
    copies.
    """
    return torch.tensor(values).to(device, non_blocking=True)


def slowdown(dtype: torch.dtype) -> float:
    """Return how many times as long as in fp32 a linear layer takes on this CPU, forward and backward.

    Measured in less than a second, with one thread, in CPU time, to which other work on the machine does not add.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _linear_seconds(dtype) / _linear_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _linear_seconds(dtype: torch.dtype) -> float:
    """Return the least CPU time of two passes."""
    x, weight, seconds = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype), []
    for _ in range(3):  # the first one warms up
        begin = time.process_time()
        y = x @ weight.t()
        y @ weight
        y.t() @ x
        seconds.append(time.process_time() - begin)
    return min(seconds[1:])


def hardware_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
