"""The engines: how processes share the base in memory, and the state of the optimizer.

    Engine   every process holds the whole base                                           DDP
    Zero     torch shards the optimizer's state; at stage 3 DeepSpeed the base's blocks   DeepSpeed
    Fsdp2    torch shards the base's blocks                                               FSDP2

Adapters are small, so every process holds all trainable parameters, and gradients are summed once an update. To a
training loop all engines are the same: ordinary parameters, gradients and optimizer, and a model whose blocks may
be gathered as they compute. So no engine knows of roles, and a checkpoint of one resumes under another.

All processes gather a sharded block together, so they must compute the same number of passes: see `together`.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perl.errors import UserError
from perl.parallel.processes import Processes


class Engine:
    """Data parallel: every process holds the whole base. It is also the engine of a process alone."""

    name = "ddp"
    shards_base = False
    """Whether the base's blocks are sharded over the processes."""
    hooks_layers = False
    """Whether it has hooks on every layer, whose outputs nobody may then change in place."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def load_device(self, device: torch.device) -> torch.device:
        """Where a base is loaded that is to compute on a device."""
        return torch.device("cpu") if self.shards_base else device

    def shard(self, lm: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Shard a frozen base's blocks over the processes; each is gathered while it computes.

        What is not in a block, such as the embeddings, moves to the device whole.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._shard(blocks, device)
        in_blocks = {id(tensor) for block in blocks for tensor in block.parameters()}
        for tensor in (*lm.parameters(), *lm.buffers()):
            if id(tensor) not in in_blocks:
                tensor.data = tensor.data.to(device)

    def _shard(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Nothing is sharded here."""

    def full_tensor(self, weight: Tensor) -> Tensor:
        """All of a weight that may be sharded; the processes call it together."""
        return weight

    def together(self, number: int) -> int:
        """The largest of the processes' numbers where they must compute in step, else this one's."""
        return self.processes.all_reduce_max(number) if self.shards_base else number

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The same optimizer, its state sharded where the engine does that."""
        return optimizer


class Fsdp2(Engine):
    """torch's `fully_shard` on each block.

    Args:
        offload: keep the shards in the host's memory.
        reshard: free a block's weights between forward and backward.
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
    """The engine that `accelerate launch` wrote into the environment; DDP where it wrote none.

    Raises:
        UserError: DeepSpeed is asked for but not installed, or asked for what it cannot do here.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        try:
            import deepspeed  # noqa: F401
        except ImportError:
            raise UserError(
                "the launcher asks for DeepSpeed, which is not installed",
                where="accelerate config, distributed_type: DEEPSPEED",
                remedy="pip install 'perl-rlhf[deepspeed]', or launch with another config of recipes/engines.",
            ) from None
        from perl.parallel.zero import zero_from_environment

        return zero_from_environment(processes)
    if _is_set("ACCELERATE_USE_FSDP"):
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin: Any = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise UserError(
                f"the launcher asks for FSDP version {plugin.fsdp_version}",
                where="accelerate config, fsdp_config",
                remedy="Set fsdp_version: 2 (recipes/engines/fsdp2.yaml is a whole config).",
            )
        offloads = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or plugin.cpu_offload is True
        return Fsdp2(processes, offloads, bool(plugin.reshard_after_forward))
    return Engine(processes)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
