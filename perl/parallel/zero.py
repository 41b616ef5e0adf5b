"""DeepSpeed: the optimizer of what learns is one of its ZeRO optimizers; at stage 3 it shards the base too.

DeepSpeed's own loop (forward, backward and step of one engine around one model) does not fit RL, which computes as
several roles, clips each by itself and refuses updates that are not finite. Its two parts are used for what they
are: the partitioning of frozen weights, and the sharded optimizer, which is handed finished gradients.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.parallel.processes import Processes

UNREAD = ("optimizer", "scheduler")
"""Sections of a DeepSpeed config that a recipe decides."""
STATE = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight."""


def zero_asked_for(processes: Processes) -> "Zero":
    """DeepSpeed as the launcher's environment has it, read by accelerate.

    Raises:
        UserError: the config has an optimizer or a scheduler of its own, or no ZeRO stage.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on first use, and is not needed
    # DeepSpeed 0.19.8 gathers by names that torch 2.13 has given up.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    from accelerate.utils import DeepSpeedPlugin

    where = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate config, deepspeed_config")
    try:
        config: dict[str, Any] = copy.deepcopy(DeepSpeedPlugin().deepspeed_config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"DeepSpeed's config cannot be used: {str(error).splitlines()[0]}"
        raise UserError(what, where=where, remedy="recipes/engines has configs that can.") from None
    for section in UNREAD:
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
        config: DeepSpeed's; batch sizes, dtypes and clipping in it are not read: the recipe has them.
    """

    def __init__(self, processes: Processes, config: dict[str, Any]) -> None:
        super().__init__(processes)
        self.stage = int(config["zero_optimization"]["stage"])
        self.name = f"zero{self.stage}"
        self._config = _without_auto(config)

    @property
    def shards_base(self) -> bool:
        """At stage 3."""
        return self.stage == 3

    @property
    def hooks_layers(self) -> bool:
        """At stage 3."""
        return self.stage == 3

    def _spread(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        import deepspeed

        (dtype,) = {weight.dtype for block in blocks for weight in block.parameters()}
        # Its own linear function saves memory where weights learn; with it, recomputed blocks do not match.
        changes = {"memory_efficient_linear": False}
        config = self._with(dtype, **changes)
        config["zero_optimization"].pop("offload_optimizer", None)
        with _launched():
            engine, *_ = deepspeed.initialize(model=nn.ModuleList(blocks), config=config)
        coordinator = engine.optimizer.get_param_coordinator()

        def begins(*_: Any) -> None:
            with _launched():
                coordinator.reset_step()

        # It expects to see a pass begin at the model that it was given, which here never computes itself.
        blocks[0].register_forward_pre_hook(begins)

    def whole(self, weight: Tensor) -> Tensor:
        """As said there."""
        if not hasattr(weight, "ds_id"):
            return weight
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """DeepSpeed's around AdamW, with the same groups."""
        return ZeroAdamW(optimizer, lambda dtype: self._with(dtype, stage=min(self.stage, 2)))

    def _with(self, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
        """DeepSpeed's config for weights of one dtype."""
        config = copy.deepcopy(self._config)
        for name in ("train_batch_size", "gradient_clipping", "fp16", "bf16", "amp"):
            config.pop(name, None)
        config["zero_optimization"] |= changes
        settings: dict[str, Any] = config | {
            "gradient_clipping": 0.0,  # gradients come clipped; DeepSpeed's default is to clip at 1
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on the host, rather than one to be compiled
            "zero_allow_untested_optimizer": True,
        }
        return settings


class _Product(nn.Module):
    """Σ weight · gradient: a loss whose gradients are those given."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight.detach().clone()) for weight in weights])

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [(weight * gradient).sum() for weight, gradient in zip(self.weights, gradients, strict=True)]
        ).sum()


class ZeroAdamW(torch.optim.Optimizer):
    """AdamW whose state DeepSpeed shares out over the processes.

    The weights here are ordinary ones with finished gradients, the same in every process. DeepSpeed trains copies
    of them by a loss that has these gradients, and what it makes of the copies is put back. An engine for each
    group: with several in one, DeepSpeed 0.19.8 finds the state of the first only.

    Args:
        plain: the AdamW it stands for.
        config: DeepSpeed's config for weights of a dtype.
    """

    def __init__(self, plain: torch.optim.Optimizer, config: Callable[[torch.dtype], dict[str, Any]]) -> None:
        super().__init__(plain.param_groups, plain.defaults)
        import deepspeed

        self._engines: dict[int, Any] = {}
        for number, group in enumerate(self.param_groups):
            if not group["params"]:  # DeepSpeed fails on an empty one
                continue
            (dtype,) = {weight.dtype for weight in group["params"]}
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            product = _Product(group["params"])
            inner = torch.optim.AdamW(product.parameters(), **settings)
            with _launched():
                engine, *_ = deepspeed.initialize(model=product, optimizer=inner, config=config(dtype))
            self._engines[number] = engine
            # There is no state to read or to set before a step; this one changes no weight.
            self._step(engine, [torch.zeros_like(weight) for weight in group["params"]], lr=0.0)
            self._set_steps(engine, torch.tensor(0.0))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the weights' gradients."""
        for number, engine in self._engines.items():
            group = self.param_groups[number]
            weights = group["params"]
            gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            self._step(engine, gradients, group["lr"])
            for weight, learned in zip(weights, engine.module.weights, strict=True):
                weight.copy_(learned)

    @staticmethod
    def _step(engine: Any, gradients: Sequence[Tensor], lr: float) -> None:
        engine.optimizer.param_groups[0]["lr"] = lr
        with torch.enable_grad():
            engine.backward(engine(gradients))
        engine.step()

    def state_dict(self) -> dict[str, Any]:
        """As plain AdamW's, whole; the processes ask together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        plain = super().state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for engine in self._engines.values():
            (inner,) = engine.optimizer.optimizer.state.values()
            for weight in engine.module.weights:
                state[len(state)] = {"step": inner["step"].detach().cpu().clone()} | {
                    key: safe_get_full_optimizer_state(weight, key).clone() for key in STATE
                }
        return plain | {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from plain AdamW's state, with the weights as they are now."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {name: value for name, value in loaded.items() if name != "params"}
        states = iter(range(sum(len(group["params"]) for group in self.param_groups)))
        for group_number, engine in self._engines.items():
            weights = self.param_groups[group_number]["params"]
            for copy_, weight in zip(engine.module.weights, weights, strict=True):
                safe_set_full_fp32_param(copy_, weight.detach().float())
                copy_.data.copy_(weight)
                if loaded := state_dict["state"].get(next(states)):
                    for key in STATE:
                        safe_set_full_optimizer_state(copy_, loaded[key].to(weight.device), key)
                    self._set_steps(engine, loaded["step"])

    @staticmethod
    def _set_steps(engine: Any, steps: Tensor) -> None:
        for inner in engine.optimizer.optimizer.state.values():
            inner["step"].copy_(steps)


def _without_auto(config: Any) -> Any:
    """A config without what it leaves to others to decide, infinities and nothings included."""
    if not isinstance(config, dict):
        return config
    kept = {name: _without_auto(value) for name, value in config.items()}
    return {name: value for name, value in kept.items() if value not in ("auto", None)}


@contextlib.contextmanager
def _launched() -> Iterator[None]:
    """Inside, the environment says what DeepSpeed insists on: each process sees one device."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
