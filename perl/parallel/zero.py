"""DeepSpeed's engine: ZeRO stages 1 and 2 shard the optimizer's state, stage 3 the base's blocks too.

DeepSpeed's own loop around one model does not fit RL, which computes as several roles, clips each by itself and
refuses updates that are not finite. So only its partitioning of frozen weights is used; torch shards the
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
    warnings.simplefilter("ignore", DeprecationWarning)  # its neighbours there use torch.jit
    from torch.distributed.optim import ZeroRedundancyOptimizer

REFUSED = ("optimizer", "scheduler")
"""Sections of a DeepSpeed config that a recipe decides."""
READ = ("zero_optimization", "aio")
"""Those that are read, for how blocks are sharded, gathered and offloaded."""


def zero_from_environment(processes: Processes) -> "Zero":
    """DeepSpeed as the launcher's environment has it, read by accelerate.

    Raises:
        UserError: the config has an optimizer or a scheduler of its own, or no ZeRO stage.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from perl.private.deepspeed import skip_shared_memory_kernel

        skip_shared_memory_kernel()
    # DeepSpeed 0.19.8 gathers by names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    from accelerate.utils import DeepSpeedPlugin

    where = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate config, deepspeed_config")
    try:
        config: dict[str, Any] = copy.deepcopy(DeepSpeedPlugin().deepspeed_config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"DeepSpeed's config cannot be used: {str(error).splitlines()[0]}"
        raise UserError(what, where=where, remedy="recipes/engines has configs that can.") from None
    for section in REFUSED:
        if section in config:
            raise UserError(
                f"DeepSpeed's config has its own {section}, the recipe has another",
                where=where,
                remedy=f"Remove {section} from it: the recipe's learning rates and schedule are the ones used.",
            )
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise UserError(f"ZeRO stage {stage} shards nothing", where=where, remedy="Set zero_stage to 1, 2 or 3.")
    return Zero(processes, config)


class Zero(Engine):
    """DeepSpeed's ZeRO.

    Args:
        config: DeepSpeed's, of which `READ` is read.
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
        # Its own linear function saves memory where weights are trained; with it, recomputed blocks do not match.
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

        # It expects a pass to begin at the model that it was given, which here never computes itself.
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
    """torch's ZeroRedundancyOptimizer, saved and loaded as the plain optimizer would be.

    Args:
        plain: the optimizer it stands for, before its first step.
    """

    def __init__(self, plain: torch.optim.Optimizer) -> None:
        # A fused step wants its count of steps on the GPU, where loading does not put it.
        super().__init__([group | {"fused": False} for group in plain.param_groups], type(plain))

    def state_dict(self) -> dict[str, Any]:
        """In the main process the plain optimizer's, whole, on the CPU; in others without state.

        The processes call it together.
        """
        self.consolidate_state_dict(to=0)
        return super().state_dict() if self.rank == 0 else torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the plain optimizer's state, of which this process keeps its share."""
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        self.state.clear()  # of no use: the optimizer of the share has its own


def _without_auto(config: Any) -> Any:
    """A config without the keys that are `auto` or null."""
    if not isinstance(config, dict):
        return config
    kept = {name: _without_auto(value) for name, value in config.items()}
    return {name: value for name, value in kept.items() if value not in ("auto", None)}


def _one_device() -> Any:
    """Inside, the environment has the rank on the host that fits one visible device, as DeepSpeed insists."""
    return mock.patch.dict(os.environ, LOCAL_RANK="0")
