"""The DeepSpeed engine: ZeRO stages 1 and 2 shard the optimizer's state, stage 3 also the base's blocks.

DeepSpeed's own loop around one model does not fit RL, which computes as several roles, clips each one's gradients
separately and refuses non-finite updates. So we use only its partitioning of frozen weights; torch shards the
optimizer's state, with ordinary parameters and gradients.
"""

import copy
import os
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.parallel.processes import Processes

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # other modules of this package use torch.jit
    from torch.distributed.optim import ZeroRedundancyOptimizer

REFUSED = ("optimizer", "scheduler")
"""Sections of a DeepSpeed config that are defined by the recipe instead."""
READ = ("zero_optimization", "aio")
"""Sections that are used, on sharding, gathering and offloading of blocks."""


def zero_from_environment(processes: Processes) -> "Zero":
    """Return the DeepSpeed engine configured in the launcher's environment, as read by accelerate.

    Raises:
        UserError: the config has its own optimizer or scheduler, or no ZeRO stage.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from perl.private.deepspeed import skip_shared_memory_kernel

        skip_shared_memory_kernel()
    # DeepSpeed 0.19.8 gathers with functions that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    from accelerate.utils import DeepSpeedPlugin

    where = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate config, deepspeed_config")
    try:
        config: dict[str, Any] = copy.deepcopy(DeepSpeedPlugin().deepspeed_config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason, _, _ = str(error).partition("\n")
        what = f"DeepSpeed's config cannot be used: {reason}"
        raise UserError(what, where=where, remedy="See recipes/engines for configs that work.") from None
    for section in REFUSED:
        if section in config:
            raise UserError(
                f"DeepSpeed's config has its own {section}, which conflicts with the recipe's",
                where=where,
                remedy=f"Remove {section} from it: the recipe's learning rates and schedule are used.",
            )
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise UserError(f"ZeRO stage {stage} shards nothing", where=where, remedy="Set zero_stage to 1, 2 or 3.")
    return Zero(processes, config)


class Zero(Engine):
    """DeepSpeed's ZeRO.

    Args:
        config: DeepSpeed's config, of which the sections `READ` are used.
    """

    def __init__(self, processes: Processes, config: dict[str, Any]) -> None:
        super().__init__(processes)
        stage = int(config["zero_optimization"]["stage"])
        self.name = f"zero{stage}"
        self.shards_base = self.hooks_layers = stage == 3
        self._config = {name: _without_auto(config[name]) for name in READ if name in config}

    def _shard(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        import deepspeed

        from perl.private.deepspeed import begin_pass

        (dtype,) = {weight.dtype for block in blocks for weight in block.parameters()}
        # DeepSpeed's linear function saves memory for trained weights, but recomputed blocks would not match.
        partitioning = self._config["zero_optimization"] | {"memory_efficient_linear": False}
        partitioning.pop("offload_optimizer", None)
        config = self._config | {
            "zero_optimization": partitioning,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }
        with _one_device():
            engine, *_ = deepspeed.initialize(model=nn.ModuleList(blocks), config=config)

        def before_first_block(*_: object) -> None:
            with _one_device():
                begin_pass(engine)

        # DeepSpeed expects a pass to begin with the module list that it was given, whose forward is never called.
        blocks[0].register_forward_pre_hook(before_first_block)

    def full_tensor(self, weight: Tensor) -> Tensor:
        import deepspeed

        from perl.private.deepspeed import is_partitioned

        if not is_partitioned(weight):
            return weight
        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return ShardedOptimizer(optimizer)


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """torch's ZeroRedundancyOptimizer, saved and loaded in the plain optimizer's format.

    Args:
        plain: the optimizer that it replaces, before its first step.
    """

    def __init__(self, plain: torch.optim.Optimizer) -> None:
        # A fused step needs its step count on the GPU, but loading does not put it there.
        super().__init__([group | {"fused": False} for group in plain.param_groups], type(plain))

    def state_dict(self) -> dict[str, Any]:
        """Return the plain optimizer's full state, on the CPU, in the main process; in others without state.

        All processes must call it together.
        """
        self.consolidate_state_dict(to=0)
        return super().state_dict() if self.rank == 0 else torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the plain optimizer's state, of which this process keeps its share."""
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        self.state.clear()  # not needed: the optimizer of this process's share has its own


def _without_auto(config: Any) -> Any:
    """Remove the keys that are `auto` or null from a config."""
    if not isinstance(config, dict):
        return config
    kept = {name: _without_auto(value) for name, value in config.items()}
    return {name: value for name, value in kept.items() if value not in ("auto", None)}


def _one_device() -> Any:
    """Set the local rank to that of the single visible device, as DeepSpeed requires."""
    return mock.patch.dict(os.environ, LOCAL_RANK="0")
