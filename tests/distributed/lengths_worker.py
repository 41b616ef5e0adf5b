"""Samples many times in processes that hold a base together, answers of very different lengths.

Each process draws what it would draw beside nobody, and how often its answers ended before the others' is printed.
"""

import random
import sys

import torch

from perl.parallel.joined import joined
from perl.rl.samplers.local import Sampling, sample
from perl.roles.roles import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora, random_llama


def roles_on(engine: object) -> SharedBase:
    """A policy on a random base, adapters not zero."""
    lm = random_llama(initializer_range=0.15, vocab_size=8)
    roles = SharedBase(lora(lm, 2, 4), engine)  # type: ignore[arg-type]
    torch.manual_seed(1)
    roles.add(Role.POLICY)
    with torch.no_grad():
        for weight in roles.parameters_of(Role.POLICY):
            weight.normal_(0, 0.1)
    return roles.eval()  # type: ignore[return-value]


def main() -> None:
    """Sample beside the others, and alone."""
    steps = int(sys.argv[1])
    with joined() as engine:
        together, alone = roles_on(engine), roles_on(None)
        sampling = Sampling(10, 1.0, end_ids=(7,), pad_id=0, prompts_at_once=2)
        shorter = 0
        for step in range(steps):
            rng = random.Random(f"{step} {engine.processes.rank}")
            lonely = engine.processes.rank == step % engine.processes.count
            # Equal prompts are one group, read at once, where the other process has several to read.
            lengths = [rng.randrange(1, 9) for _ in range(1 if lonely else 5)]
            prompts = [[rng.randrange(1, 7) for _ in range(length)] for length in lengths] * (3 if lonely else 1)
            drawn = [
                sample(roles, Role.POLICY, prompts, sampling, torch.Generator().manual_seed(step)).completions()
                for roles in ((together,) if step % 10 else (together, alone))
            ]
            assert drawn[0] == drawn[-1], (step, drawn)
            longest = max(len(answer) for answer in drawn[0])
            shorter += longest < engine.processes.all_reduce_max(longest)
        told = engine.processes.all_gather(shorter)
        if engine.processes.main:
            sys.stdout.write(f"done {steps} steps; ended before the others: {told}\n")


if __name__ == "__main__":
    main()
