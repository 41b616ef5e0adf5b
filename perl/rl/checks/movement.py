"""Movement of the policy from its reference, measured below rounding.

The first update moves a token's log-prob by less than bfloat16's rounding. The adapter's change is therefore
magnified until the log-probs move by far more, and their movement is divided by the magnification, because the
log-probs are nearly linear in such a small change.

Axis letters: B completions, T completion positions.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from perl.rl.checks.perturbation import part_of, restored
from perl.rl.checks.tracking import gap
from perl.rl.collector import Collector
from perl.rl.samplers.base import Samples
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase

NATS = 0.1
"""A movement that needs no magnification; above five times this value it is no longer linear."""
MOST = 1e6
"""Largest factor by which the magnification grows at once."""
TRIES = 10
DECADES = tuple(10.0**power for power in range(9))
"""Magnifications for adapters that cannot move the policy far."""
FEWEST_STEPS = 10.0
"""The movement of a shorter run is extrapolated to this many steps."""


def policy_movement(collector: Collector, samples: Samples) -> float:
    """Return the main process's mean absolute difference of policy and reference log-probs, nats per token.

    Whole models are not magnified; their movement includes rounding.
    """
    reference_BT = collector.log_probs(collector.roles.reference, samples)
    weights, starts = collector.roles.weights(Role.POLICY), _starts(collector.roles)

    def magnified(factor: float) -> float:
        """Return how far the policy would have moved if its adapter had moved `factor` times as far."""
        with restored(weights[name] for name in starts) as parts:
            for start, part in zip(starts.values(), parts, strict=True):
                part.copy_(start + factor * (part - start))
            policy_BT = collector.log_probs(Role.POLICY, samples)
            return collector.processes.broadcast(gap(policy_BT, reference_BT, samples))

    return below_rounding(magnified) if starts else magnified(1.0)


def below_rounding(magnified: Callable[[float], float]) -> float:
    """Return how far an adapter has moved the policy, nats per token, from its movement under magnification."""
    moved, factor = magnified(1.0), 1.0
    farthest = moved
    for _ in range(TRIES):
        if NATS <= moved <= 5 * NATS or (factor == 1.0 and moved > NATS):
            break
        factor = max(1.0, factor * (min(2 * NATS / moved, MOST) if moved > 0 else MOST))
        moved = magnified(factor)
        farthest = max(farthest, moved)
    return _steadiest(magnified) if 0 < farthest < NATS else moved / factor


def _steadiest(magnified: Callable[[float], float]) -> float:
    """Return the movement of an adapter that cannot move the policy by `NATS`, however much it is magnified.

    A prefix, for example, is behind a gate tanh(g), which is at most 1. The movement divided by the factor falls
    while rounding dominates, is steady in the linear range, and falls again above it; the steadiest value is used.
    """
    moved = [magnified(factor) / factor for factor in DECADES]
    pairs = [pair for pair in pairwise(moved) if min(pair) > 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1])), default=(0.0, moved[-1]))[1]


def _starts(roles: Roles) -> dict[str, Tensor | float]:
    """Return the policy adapter's start: the reference's, or on a bare base a new adapter's initial values."""
    if not isinstance(roles, SharedBase):
        return {}
    reference = roles.weights(roles.reference)
    starts: dict[str, Tensor | float] = {name: part_of(start) for name, start in reference.items()}
    for name in roles.weights(Role.POLICY):
        if name not in starts and (value := roles.adapter.starting_value(name)) is not None:
            starts[name] = value
    return starts


def at_the_end(moved: float, rate_shares: list[float], steps: int) -> float:
    """Extrapolate a movement to the end of the run, as if every step went equally far in the same direction.

    Args:
        moved: movement after `steps` steps, nats per token.
        rate_shares: each step's learning rate, as a share of the full one.
    """
    return moved / max(sum(rate_shares[:steps]), 1e-9) * max(sum(rate_shares), FEWEST_STEPS)
