"""The compute device: its name, tensors for it, and the dtypes in which it is slow."""

import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device) -> Tensor:
    """Return a tensor of these numbers on a device, without waiting for pending work of the device.

    A GPU computes asynchronously; the host waits for it when it reads a value or makes one of torch's default
    copies.
    """
    return torch.tensor(values).to(device, non_blocking=True)


def slowdown(dtype: torch.dtype) -> float:
    """Return how many times longer than in fp32 a matrix product takes on this CPU; measuring takes some 50 ms."""
    return _seconds_of_product(dtype) / _seconds_of_product(torch.float32)


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Return the shortest of three times."""
    x, weight, seconds = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype), []
    for _ in range(4):  # the first warms up
        begin = time.perf_counter()
        x @ weight
        seconds.append(time.perf_counter() - begin)
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
