"""Captures the state of training between two steps as a `State`, and restores it.

The state is what does not follow from the recipe: the weights and heads of the trained roles, the optimizer and
its schedule, and the random generators.
"""

import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perl.errors import UserError
from perl.parallel.processes import ALONE, Processes
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.runs.checkpoint import State


def trained_state(roles: Roles, learners: Sequence[Role]) -> dict[str, Tensor]:
    """Return the weights and heads of the trained roles, by role and name."""
    named: dict[str, Tensor] = {}
    for role in learners:
        named |= {f"{role}.{name}": parameter for name, parameter in roles.weights(role).items()}
        if role in roles.heads:
            named |= {f"{role}.{name}": parameter for name, parameter in roles.head_weights(role).items()}
    return named


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself, without accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def take(step: int, roles: Roles, learners: Sequence[Role], optimizer: torch.optim.Optimizer) -> State:
    """Return the state after a step; its tensors are not copied, so write them before the next step."""
    moments = optimizer.state_dict()
    generator_tensors, generator_values = generators(roles.engine.processes)
    tensors = trained_state(roles, learners) | generator_tensors
    scalars: dict[str, dict[str, Any]] = {}
    for number, of_parameter in moments["state"].items():
        for name, value in of_parameter.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            else:
                scalars.setdefault(str(number), {})[name] = value
    optimizer_values = {"groups": moments["param_groups"], "scalars": scalars}
    return State(step, tensors, {"optimizer": optimizer_values, "generators": generator_values})


def restore(
    roles: Roles, learners: Sequence[Role], optimizer: torch.optim.Optimizer, state: State, where: str
) -> None:
    """Restore a state except the generators.

    Args:
        where: the checkpoint, for messages.

    Raises:
        UserError: the state has other roles or other shapes.
    """
    load_trained_state(roles, learners, state.tensors, where)
    moments: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, tensor in state.tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, key = rest.split(".", 1)
            moments[int(number)][key] = tensor
    for number, scalars in state.values["optimizer"]["scalars"].items():
        moments[int(number)] |= scalars
    groups = state.values["optimizer"]["groups"]
    optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})


def load_trained_state(roles: Roles, learners: Sequence[Role], tensors: dict[str, Tensor], where: str) -> None:
    """Restore the weights and heads of the roles, and nothing else.

    Raises:
        UserError: the tensors have other roles or other shapes.
    """
    with torch.no_grad():
        for name, parameter in trained_state(roles, learners).items():
            saved = tensors.get(name)
            if saved is None or saved.shape != parameter.shape:
                there = "is missing" if saved is None else f"is {tuple(saved.shape)}"
                raise UserError(
                    f"this checkpoint has other adapters: {name} {there}, here it is {tuple(parameter.shape)}",
                    where=where,
                    remedy="Remove that folder, or use another --out.",
                )
            parameter.copy_(saved)


def generators(processes: Processes = ALONE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every global generator, as tensors and JSON; torch's, used for dropout, per process."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tensors = {
        _generator(name, rank): state
        for rank, of_rank in enumerate(processes.all_gather(states))
        for name, state in of_rank.items()
    }
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return tensors, {"python": random.getstate(), "numpy": numpy}


def _generator(name: str, rank: int) -> str:
    return f"generator.{name}" + (f".{rank}" if rank else "")


def set_generators(state: State, processes: Processes = ALONE) -> None:
    """Restore the global generators; an additional process gets its own seed."""
    tensors = state.tensors
    version, words, gauss = state.values["generators"]["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state.values["generators"]["numpy"])
    own = _generator("torch", processes.rank)
    if own in tensors:
        torch.set_rng_state(tensors[own])
    else:
        torch.manual_seed(zlib.crc32(bytes(tensors["generator.torch"].tolist())) + processes.rank)
    cuda = _generator("cuda", processes.rank)
    if torch.cuda.is_available() and cuda in tensors:
        torch.cuda.set_rng_state(tensors[cuda])
