"""The engines: how processes share the base's memory and the optimizer's state.

    Engine   every process holds the whole base                                           DDP
    Zero     torch shards the optimizer's state; at stage 3 DeepSpeed the base's blocks   DeepSpeed
    Fsdp2    torch shards the base's blocks                                               FSDP2

Adapters are small, so every process holds all trainable parameters, and gradients are summed once per update. All
engines look the same to a training loop: ordinary parameters, gradients and optimizer, and a model whose blocks
may be gathered during computation. So engines are independent of roles, and a checkpoint written under one engine
can be resumed under another.

All processes gather a sharded block together, so they must run the same number of passes: see `together`.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perl.errors import UserError
from perl.parallel.processes import Processes


class Engine:
    """Data parallelism: every process holds the whole base. Also used for a single process."""

    name = "ddp"
    shards_base = False
    """Whether the base's blocks are sharded over the processes."""
    hooks_layers = False
    """Whether it has hooks on every layer, whose outputs must then not be modified in place."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def load_device(self, device: torch.device) -> torch.device:
        """Return the device on which to load a base that computes on `device`."""
        return torch.device("cpu") if self.shards_base else device

    def shard(self, lm: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Shard a frozen base's blocks over the processes; each is gathered during its computation.

        Tensors outside blocks, such as the embeddings, are moved to the device unsharded.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._shard(blocks, device)
        in_blocks = {id(tensor) for block in blocks for tensor in block.parameters()}
        for tensor in (*lm.parameters(), *lm.buffers()):
            if id(tensor) not in in_blocks:
                tensor.data = tensor.data.to(device)

    def _shard(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Do nothing: this engine shards no blocks."""

    def full_tensor(self, weight: Tensor) -> Tensor:
        """Return the full tensor of a weight that may be sharded; all processes must call it together."""
        return weight

    def together(self, number: int) -> int:
        """Return the maximum over the processes if they must run in lockstep, otherwise this process's number."""
        return self.processes.all_reduce_max(number) if self.shards_base else number

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer, with its state sharded if the engine does so."""
        return optimizer


class Fsdp2(Engine):
    """torch's `fully_shard` on each block.

    Args:
        offload: keep the shards in the host's memory.
        reshard: free a block's gathered weights between forward and backward.
    """

    name = "fsdp2"
    shards_base = True

    def __init__(self, processes: Processes, offload: bool, reshard: bool) -> None:
        super().__init__(processes)
        self._offload, self._reshard = offload, reshard

    def _shard(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.processes.count,))
        policy = CPUOffloadPolicy() if self._offload else OffloadPolicy()
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self._reshard, offload_policy=policy)

    def full_tensor(self, weight: Tensor) -> Tensor:
        full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return full


def engine_from_environment(processes: Processes) -> Engine:
    """Return the engine that `accelerate launch` set in the environment; DDP if it set none.

    Raises:
        UserError: DeepSpeed is requested but not installed, or with an unsupported configuration.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        try:
            import deepspeed  # noqa: F401
        except ImportError:
            raise UserError(
                "the launcher requests DeepSpeed, which is not installed",
                where="accelerate config, distributed_type: DEEPSPEED",
                remedy="pip install 'perl-rlhf[deepspeed]', or launch with another config from recipes/engines.",
            ) from None
        from perl.parallel.zero import zero_from_environment

        return zero_from_environment(processes)
    if _is_set("ACCELERATE_USE_FSDP"):
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin: Any = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise UserError(
                f"the launcher requests FSDP version {plugin.fsdp_version}",
                where="accelerate config, fsdp_config",
                remedy="Set fsdp_version: 2 (recipes/engines/fsdp2.yaml is a complete config).",
            )
        offloads = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or plugin.cpu_offload is True
        return Fsdp2(processes, offloads, bool(plugin.reshard_after_forward))
    return Engine(processes)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
