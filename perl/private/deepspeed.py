"""The private interfaces of DeepSpeed that PERL uses; importing this module imports DeepSpeed."""

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
    """Disable the kernel that DeepSpeed would compile for CPU collectives on first use."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_partitioned(weight: torch.Tensor) -> bool:
    """Return whether ZeRO-3 has sharded this parameter."""
    return hasattr(weight, "ds_id")


def begin_pass(engine: Any) -> None:
    """Tell ZeRO-3's prefetching that a forward pass begins, as its hook on the whole model does."""
    engine.optimizer.get_param_coordinator().reset_step()
