"""Runs in each process of one launch, because imports and the process group cost more than tiny runs.

Arguments: an engine's name, which applies to those after it; RECIPE=DIR, a recipe to run; the name of a check. The
main process prints a check's results in all processes as `NAME: JSON`.
"""

import copy
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from perl.parallel.engine import Engine, engine_from_environment
from perl.parallel.launcher import skips_finalization
from perl.parallel.process_group import process_group
from perl.recipe import load_recipe
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.stages.pipeline import run
from tests.distributed.launching import engine_environment
from tests.tiny import lora, random_llama

SAMPLED = 10
"""Number of times that `lengths` samples in each process."""


def roles_on(engine: Engine | None) -> SharedBase:
    """Return a policy on a random base, with a nonzero adapter."""
    lm = random_llama(initializer_range=0.15, vocab_size=8)
    roles = SharedBase(lora(lm, 2, 4), engine)
    torch.manual_seed(1)
    roles.add(Role.POLICY)
    with torch.no_grad():
        for weight in roles.parameters_of(Role.POLICY):
            weight.normal_(0, 0.1)
    return roles.eval()  # type: ignore[return-value]


def lengths(engine: Engine) -> int:
    """Sample completions of very different lengths together with the other processes, and sometimes alone.

    Returns:
        how often this process's completions ended before those of another.
    """
    together, alone = LocalSampler(roles_on(engine)), LocalSampler(roles_on(None))
    sampling = Sampling(10, 1.0, end_ids=(7,), pad_id=0, prompts_at_once=2)
    shorter = 0
    for step in range(SAMPLED * engine.processes.count):
        rng = random.Random(f"{step} {engine.processes.rank}")
        lonely = engine.processes.rank == step % engine.processes.count
        # Equal prompts are one group, read at once, where the other process has several to read.
        sizes = [rng.randrange(1, 9) for _ in range(1 if lonely else 5)]
        prompts = [[rng.randrange(1, 7) for _ in range(size)] for size in sizes] * (3 if lonely else 1)
        drawn = [
            sampler.draw(Role.POLICY, prompts, sampling, torch.Generator().manual_seed(step)).completions()
            for sampler in ((together,) if step % 10 else (together, alone))
        ]
        assert drawn[0] == drawn[-1], (step, drawn)
        longest = max(len(completion) for completion in drawn[0])
        shorter += longest < engine.processes.all_reduce_max(longest)
    return shorter


def weights() -> list[torch.nn.Parameter]:
    """Return parameters of four shapes."""
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((4, 8), (8, 3), (5,), (1, 7))]


def adamw(learning: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW with two groups, like those of adapters and heads."""
    return torch.optim.AdamW(
        [{"params": learning[:3], "lr": 1e-2}, {"params": learning[3:], "lr": 1e-1}], weight_decay=0.0
    )


def train(optimizer: torch.optim.Optimizer, learning: list[torch.nn.Parameter], steps: range) -> None:
    """Train with a schedule, as a training loop does."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for weight in learning:
            weight.grad = torch.randn(weight.shape, generator=draw)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
        optimizer.zero_grad()


def difference(one: list[torch.nn.Parameter], other: list[torch.nn.Parameter]) -> float:
    """Return the largest absolute difference."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))


def optimizer(engine: Engine) -> dict[str, float]:
    """Return the engine's optimizer's differences from AdamW: after steps, in the state, and after resuming."""
    plain, ours = weights(), weights()
    reference, sharded = adamw(plain), engine.optimizer(adamw(ours))
    train(reference, plain, range(3))
    train(sharded, ours, range(3))
    found = {"steps": difference(plain, ours)}
    held = sharded.optim.state  # type: ignore[attr-defined]  # of torch's ZeroRedundancyOptimizer
    found["held"] = sum(weight.numel() for weight in held) / sum(weight.numel() for weight in ours)
    state, expected = sharded.state_dict(), reference.state_dict()
    found["state"] = max(
        float((state["state"][number][name] - tensor).abs().max()) if engine.processes.main else 0.0
        for number, tensors in expected["state"].items()
        for name, tensor in tensors.items()
    )
    onward = [torch.nn.Parameter(weight.detach().clone()) for weight in plain]
    resumed = engine.optimizer(adamw(onward))
    resumed.load_state_dict(copy.deepcopy(expected))  # as read from a file: the tensors are its own
    train(reference, plain, range(3, 6))
    train(resumed, onward, range(3, 6))
    return found | {"resumed": difference(plain, onward)}


CHECKS: dict[str, Callable[[Engine], object]] = {"lengths": lengths, "optimizer": optimizer}


@skips_finalization
def main() -> None:
    """Run the tasks given as arguments, in order."""
    with process_group() as engine:
        processes = engine.processes
        for argument in sys.argv[1:]:
            if argument in CHECKS:
                found = processes.all_gather(CHECKS[argument](engine))
                if processes.main:
                    sys.stdout.write(f"{engine.name} {argument}: {json.dumps(found)}\n")
            elif "=" in argument:
                recipe, out = argument.split("=")
                run(load_recipe(recipe), Path(out), engine=engine)
            else:
                with mock.patch.dict(os.environ, engine_environment(argument)):
                    engine = engine_from_environment(processes)


if __name__ == "__main__":
    main()
