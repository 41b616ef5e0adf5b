"""The private interfaces of DeepSpeed that this package uses; importing this imports DeepSpeed."""

from typing import Any

import deepspeed.ops
import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from perl.private.checked import need

need(deepspeed.ops, "__compatible_ops__")
need(DeepSpeedZeRoOffload, "get_param_coordinator")
need(PartitionedParameterCoordinator, "reset_step")


def skip_shared_memory_kernel() -> None:
    """Do without the kernel that DeepSpeed would compile for a CPU's collectives on first use."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_partitioned(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 has sharded this parameter."""
    return hasattr(weight, "ds_id")


def begin_pass(engine: Any) -> None:
    """Tell ZeRO-3's prefetching that a forward pass begins, as its hook on the whole model would."""
    engine.optimizer.get_param_coordinator().reset_step()
